"""The standard normal numbers of torch's CUDA generator: Philox4x32-10 and the Box-Muller transform, in numpy.

What is reproduced is ``torch.randn(..., device="cuda")`` in float32. Philox (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") turns a 128-bit counter and a 64-bit key, the seed, into four words. torch starts a
kernel of ``threads = min(size rounded up to blocks of 256, cap)`` threads; thread t uses the counters (offset, t),
makes four normals of each, and element e is normal ``e // threads % 4`` of thread ``e % threads``. A call moves the
offset on by the counters that each thread used.

The cap belongs to the GPU: it can't hold more threads than multiprocessors times threads per multiprocessor. Sizes up
to that number get one thread per element and are the same on every such GPU; larger ones depend on it:

====================  ===========  ==================
GPU                   threads      4-channel latent
====================  ===========  ==================
T4                    40 x 1024    up to 101 x 101
RTX 3060              28 x 1536    up to 103 x 103
RTX 4090              128 x 1536   up to 221 x 221
A100                  108 x 2048   up to 235 x 235
H100                  132 x 2048   up to 259 x 259
====================  ===========  ==================

Without a number of resident threads there is no cap, which is what AUTOMATIC1111's "NV" noise does.
Limits: float32 only; the GPU's fast sine and cosine are not bit-exact here: expect differences of about 1e-6.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pocketdiffusion.tensors import Array

Words = NDArray[np.uint64]
"""32-bit words, each in a 64-bit integer so that products keep their high half."""

_BLOCK = 256
_NORMALS_PER_COUNTER = 4
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TO_UNIT = np.float64(np.float32(2.0**-32))
_TO_ANGLE = np.float64(np.float32(np.float32(2.0**-32) * np.float32(2 * math.pi)))


class Philox:
    """One stream of numbers, the continuation of which depends on the sizes asked for so far, as in torch."""

    def __init__(self, seed: int, resident_threads: int | None = None) -> None:
        self._seed = seed
        self._offset = 0
        self._resident_threads = resident_threads

    def standard_normal(self, size: int) -> Array:
        """The next `size` numbers, float32, shape (size,)."""
        if size == 0:
            return np.empty(0, np.float32)
        threads = self._threads(size)
        batches = [
            self._batch(min(threads, size - start), min(_NORMALS_PER_COUNTER, math.ceil((size - start) / threads)))
            for start in range(0, size, _NORMALS_PER_COUNTER * threads)
        ]
        return np.concatenate(batches)[:size]

    def _threads(self, size: int) -> int:
        blocks = math.ceil(size / _BLOCK)
        if self._resident_threads is not None:
            blocks = min(blocks, self._resident_threads // _BLOCK)
        return blocks * _BLOCK

    def _batch(self, threads: int, normals: int) -> Array:
        """Take one counter in each thread: shape (normals * threads,), all first normals before all second ones."""
        counter = (self._offset & _MASK, self._offset >> 32)
        self._offset += 1
        words = philox_4x32(counter, np.arange(threads, dtype=np.uint64), self._seed)
        pairs = [_box_muller(words[i], words[i + 1]) for i in range(0, normals, 2)]
        return np.concatenate([row for pair in pairs for row in pair][:normals])


def philox_4x32(low: tuple[int, int], third: Words, key: int) -> tuple[Words, Words, Words, Words]:
    """Ten rounds on the counters (low[0], low[1], third, 0), one for each element of `third`, with a 64-bit key."""
    c0, c1 = (np.full_like(third, word) for word in low)
    c2, c3 = third, np.zeros_like(third)
    mask, half = np.uint64(_MASK), np.uint64(32)
    k0, k1 = key & _MASK, key >> 32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (p1 >> half) ^ c1 ^ np.uint64(k0), (p0 >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(x: Words, y: Words) -> tuple[Array, Array]:
    """Two words to two normals, sine first, rounded to float32 where cuRAND rounds."""
    unit = _scaled(x, _TO_UNIT)
    angle = _scaled(y, _TO_ANGLE)
    radius = np.sqrt(np.float32(-2) * np.log(unit))
    return radius * np.sin(angle), radius * np.cos(angle)


def _scaled(words: Words, factor: np.float64) -> Array:
    """``(word + 1/2) * factor`` in float32. The GPU fuses product and sum, so float64 is rounded once."""
    return (words.astype(np.float32).astype(np.float64) * factor + factor / 2).astype(np.float32)
