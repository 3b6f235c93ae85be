"""One operator after another in opset 17, for TensorRT 8: the same values, or a refusal by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.helper import make_node
from small_onnx import small

from thinet_deploy.errors import TargetError
from thinet_deploy.precision.calibration import session
from thinet_deploy.precision.downgrade import to_opset_17
from thinet_deploy.precision.graph import opset_of

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
Floats = NDArray[np.float32]


def down(node: Any, stored: dict[str, Any], given: list[Any], x: Floats) -> tuple[ModelProto, Floats, Floats]:
    """One node in both opsets, on the same values."""
    net = small([node], stored, {"x": ["n", *x.shape[1:]], "y": given})
    older = to_opset_17(net)
    first, second = (session(each, literal=True).run(None, {"x": x})[0] for each in (net, older))
    return older, first, second


X = np.random.default_rng(1).standard_normal((2, 7, 4, 5)).astype(np.float32)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[Any]]] = {
    "mean of the map": (
        lambda: make_node("ReduceMean", ["x", "a"], ["y"]), {"a": np.array([-1, 2])}, ["n", 7, 1, 1]),
    "mean of the map, flat": (
        lambda: make_node("ReduceMean", ["x", "a"], ["y"], keepdims=0), {"a": np.array([2, 3])}, ["n", 7]),
    "mean of channels": (
        lambda: make_node("ReduceMean", ["x", "a"], ["y"]), {"a": np.array([1])}, ["n", 1, 4, 5]),
    "mean of nothing": (
        lambda: make_node("ReduceMean", ["x"], ["y"], noop_with_empty_axes=1), {}, ["n", 7, 4, 5]),
    "largest of all": (
        lambda: make_node("ReduceMax", ["x"], ["y"]), {}, [1, 1, 1, 1]),
    "padded along named axes": (
        lambda: make_node("Pad", ["x", "p", "v", "a"], ["y"]),
        {"p": np.array([1, 2, 3, 4]), "v": np.float32(0.5), "a": np.array([-1, 1])}, ["n", 13, 4, 9]),
    "resized": (
        lambda: make_node("Resize", ["x", "", "s"], ["y"], mode="nearest", antialias=0),
        {"s": np.array([1, 1, 2, 2], np.float32)}, ["n", 7, 8, 10]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_operator_means_the_same_in_17(case: str) -> None:
    node, stored, given = CASES[case]
    older, first, second = down(node(), stored, given, X)
    assert opset_of(older) == 17
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_unequal_parts_of_a_split_are_spelled_out() -> None:
    nodes = [
        make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
        make_node("Concat", ["c", "a", "b"], ["y"], axis=1),
    ]
    net = small(nodes, {}, {"x": ["n", 7, 4, 5], "y": ["n", 7, 4, 5]})
    first, second = (session(each, literal=True).run(None, {"x": X})[0] for each in (net, to_opset_17(net)))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("node", "stored", "what"),
    [
        (
            lambda: make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1),
            {"s": np.ones(4, np.float32)}, "antialias",
        ),
        (lambda: make_node("Mish", ["x"], ["y"]), {}, "Mish"),
    ],
)  # fmt: skip
def test_what_17_cannot_say_is_refused_by_name(node: Callable[[], Any], stored: dict[str, Any], what: str) -> None:
    net = small([node()], stored, {"x": ["n", 7, 4, 5], "y": ["n", 7, 4, 5]})
    with pytest.raises(TargetError, match=f"{what}.*opset 17|opset 17.*{what}"):
        to_opset_17(net)
