"""The standard normal numbers of torch's CPU generator: MT19937 and the Box-Muller transform, in numpy.

What is reproduced is ``torch.randn(..., generator=torch.Generator())`` in float32:

- the state is seeded with the low 32 bits of the seed (Matsumoto & Nishimura 1998, `init_genrand`);
- 16 numbers and more: 24-bit uniforms, transformed in rows of 16, the first eight of a row being the radii and the
  other eight the angles. A size that is no multiple of 16 draws 16 fresh uniforms for its last 16 numbers;
- fewer than 16 numbers: one by one in float64 from 53-bit uniforms; the second number of each pair is kept for the next
  such call, also across longer calls in between.

Limits: float32 only (torch draws float16 and float64 otherwise); log, sin and cos differ from torch's in the last bits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.tensors import Array

_ROW = 16
_TWO_PI = np.float32(2 * math.pi)


class MersenneTwister:
    """One stream of numbers, the continuation of which depends on the sizes asked for so far, as in torch."""

    def __init__(self, seed: int) -> None:
        # RandomState's stream is frozen by numpy's policy (NEP 19), and it seeds MT19937 as torch does.
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def standard_normal(self, size: int) -> Array:
        """The next `size` numbers, float32, shape (size,)."""
        if size < _ROW:
            return np.array([self._one() for _ in range(size)], np.float32)
        whole = size - size % _ROW
        normal = np.empty(size, np.float32)
        normal[:whole] = _box_muller_rows(self._uniform(size)[:whole])
        if whole != size:
            normal[-_ROW:] = _box_muller_rows(self._uniform(_ROW))
        return normal

    def _uniform(self, size: int) -> Array:
        return (self._words(size) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        if self._spare is not None:
            normal, self._spare = self._spare, None
            return normal
        high1, low1, high2, low2 = self._words(4).tolist()
        angle = 2 * math.pi * _uniform53(high1, low1)
        radius = math.sqrt(-2 * math.log1p(-_uniform53(high2, low2)))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _words(self, size: int) -> NDArray[np.uint32]:
        return self._bits.randint(0, 2**32, size=size, dtype=np.uint32)


def _uniform53(high: int, low: int) -> float:
    return float((high << 32 | low) & (2**53 - 1)) * 2**-53


def _box_muller_rows(uniform: Array) -> Array:
    """Uniforms in [0, 1), a multiple of 16 of them, to as many normals (Box & Muller 1958)."""
    rows = uniform.reshape(-1, 2, _ROW // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - rows[:, 0]))
    angle = _TWO_PI * rows[:, 1]  # in float32 as in torch: its rounding is the largest part of the result's error
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
