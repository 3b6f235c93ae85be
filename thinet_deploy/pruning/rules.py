"""How operations carry labels: shape operations run on the label tensor itself, elementwise ones unify.

An operation that has no rule freezes the channels that reach it; everything else goes on.
"""

from __future__ import annotations

from . import layer_rules, shape_rules
from .label_pass import Labels, Pass
from .labels import Book, MismatchError
from .trace import Trace

__all__ = ["layer_rules", "run", "shape_rules"]  # the two modules fill the table of rules


def run(trace: Trace, book: Book) -> dict[str, Labels]:
    """Let labels run through a network; the label tensors of all nodes.

    Raises:
        MismatchError: from `Check`; its `node` is the operation.
    """
    current = Pass(trace, book)
    for node in trace.nodes:
        try:
            current.step(node)
        except MismatchError as error:
            error.node = node  # type: ignore[attr-defined]
            raise
    return current.values
