"""Random choices derived from what they are for, never from a running generator.

A choice depends on (seed, stage, layer, image …) alone, so that resuming, batch size and the number
of processes cannot change it.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(*parts: int | str) -> int:
    """A 63-bit number that depends on all `parts` and on nothing else."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded by `derive(*parts)`."""
    return np.random.Generator(np.random.Philox(key=derive(*parts)))
