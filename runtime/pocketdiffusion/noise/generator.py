"""Seeded sources of noise that draw the numbers torch draws, without torch.

`Generator("cpu")` continues like ``torch.randn(shape, generator=torch.Generator())``, `Generator("cuda")` like the
same call on an NVIDIA GPU, whatever the device that the models run on. So a seed taken from Diffusers (either device)
or from AUTOMATIC1111 (`RNG: CPU` or `RNG: NV`) gives the same starting noise here.

Limits: float32; equal to torch up to about 1e-6 rather than to the bit, because logarithms and sines are rounded
differently from one library to the next. See `mersenne` and `philox` for what each device does.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence

import numpy as np

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.noise.mersenne import MersenneTwister
from pocketdiffusion.noise.philox import Philox
from pocketdiffusion.tensors import Array, Noise

DEVICES = ("cpu", "cuda")
MAX_SEED = 2**64 - 1
DEFAULT_SEED = 67280421310721
"""The seed of a new torch.Generator."""


class Generator:
    """A stream of standard normal numbers, in the shape of torch.Generator: ``Generator("cuda").manual_seed(7)``.

    `resident_threads` (CUDA only) makes tensors larger than that follow one particular GPU; see `philox`. A new
    generator has torch's default seed. Not safe to share between threads that draw at the same time.
    """

    def __init__(self, device: str = "cpu", *, resident_threads: int | None = None) -> None:
        if device not in DEVICES:
            raise InvalidRequest(
                "generator", f"no noise generator for device {device!r}; choose from: {', '.join(DEVICES)}"
            )
        if resident_threads is not None and (device != "cuda" or resident_threads < 256):
            raise InvalidRequest(
                "resident_threads",
                f"resident_threads={resident_threads} on {device!r}; it must be 256 or more, on 'cuda'",
            )
        self.device = device
        self._resident_threads = resident_threads
        self.manual_seed(DEFAULT_SEED)

    def manual_seed(self, seed: int) -> Generator:
        """Restart from a seed in 0..2**64-1 ("cpu" uses its low 32 bits, as torch does). Raises InvalidRequest."""
        self._seed = checked_seed(seed)
        self._stream: MersenneTwister | Philox
        if self.device == "cpu":
            self._stream = MersenneTwister(self._seed)
        else:
            self._stream = Philox(self._seed, self._resident_threads)
        return self

    def initial_seed(self) -> int:
        """The seed that the stream started from."""
        return self._seed

    def randn(self, shape: Sequence[int]) -> Array:
        """The next standard normal numbers, float32. They depend on the sizes drawn before, as in torch."""
        return self._stream.standard_normal(math.prod(shape)).reshape(tuple(shape))

    def __repr__(self) -> str:
        return f"Generator(device={self.device!r}, seed={self._seed})"


def checked_seed(seed: object) -> int:
    """`seed` as an int in 0..2**64-1, or InvalidRequest."""
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if not 0 <= value <= MAX_SEED:
        raise InvalidRequest("seed", f"seed {seed!r} can't be used; give a whole number from 0 to 2**64-1 ({MAX_SEED})")
    return value


def random_seed() -> int:
    """A fresh 32-bit seed, the range that other tools show and take."""
    return secrets.randbits(32)


def as_generator(source: object) -> Generator:
    """`source` itself if it is a `Generator`, else one that imitates a torch.Generator (known by its methods).

    A torch.Generator is read by `initial_seed()` and `device` only, and is left as it is: numbers that were drawn
    from it before are drawn again, and two calls with the same torch.Generator give the same noise.
    """
    if isinstance(source, Generator):
        return source
    initial_seed, device = getattr(source, "initial_seed", None), getattr(source, "device", None)
    if not callable(initial_seed) or device is None:
        raise InvalidRequest(
            "generator",
            f"a {type(source).__name__} is no generator; give pocketdiffusion.Generator or torch.Generator",
        )
    return Generator(str(device).partition(":")[0]).manual_seed(initial_seed())


def image_generators(source: object, count: int, device: str = "cpu") -> list[Generator]:
    """One generator for each of `count` images.

    - a seed: image i has the seed ``seed + i`` on `device`, so that it can be made again alone;
    - a list of seeds or generators: one per image;
    - one generator: all images draw from it in turn, as Diffusers does; only the first image can be made again alone.

    `device` is for seeds; generators keep their own. Raises InvalidRequest.
    """
    if isinstance(source, (list, tuple)):
        if len(source) != count:
            raise InvalidRequest(
                "generator", f"{len(source)} seeds or generators for {count} images; give one for each image"
            )
        return [_one_generator(item, device) for item in source]
    if hasattr(source, "initial_seed"):
        return [as_generator(source)] * count
    seed = checked_seed(source)
    return [Generator(device).manual_seed(seed + i) for i in range(count)]


def _one_generator(source: object, device: str) -> Generator:
    if hasattr(source, "initial_seed"):
        return as_generator(source)
    return Generator(device).manual_seed(checked_seed(source))


def stacked(generators: Sequence[Generator], shape: Sequence[int]) -> Noise:
    """A source of noise of `shape` (images, ...): each image from its own generator, in the order of the images.

    The same generator for all images is drawn from once for the whole shape. Both are what Diffusers' randn_tensor
    does.
    """
    if len(generators) != shape[0]:
        raise InvalidRequest(
            "generator", f"{len(generators)} generators for {shape[0]} images; give one for each image"
        )
    whole, one = tuple(shape), (1, *shape[1:])
    shared = all(generator is generators[0] for generator in generators)

    def draw() -> Array:
        if shared:
            return generators[0].randn(whole)
        return np.concatenate([generator.randn(one) for generator in generators])

    return draw
