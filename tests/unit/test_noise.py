from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.noise.generator import (
    DEFAULT_SEED,
    MAX_SEED,
    Generator,
    as_generator,
    image_generators,
    random_seed,
    stacked,
)
from pocketdiffusion.noise.philox import philox_4x32

# python -c "import torch; g = torch.Generator().manual_seed(7); print([torch.randn(n, generator=g)[-3:].tolist()
#            for n in (3, 16, 2, 21, 1, 64)])"     # torch 2.13.0, CPU
MIXED_SIZES = (3, 16, 2, 21, 1, 64)
MIXED = [
    [-0.1467951, 0.7861413, 0.9468216],
    [0.352749, -1.0842019, -0.8874901],
    [-1.114344, 0.1373241],
    [-0.355266, 0.7541925, 0.6901244],
    [0.2405461],
    [0.2830259, 1.1854521, -1.2979646],
]

# python -c "import torch; print(torch.randn(16, generator=torch.Generator().manual_seed(2**40 + 5))[:4].tolist())"
LONG_SEED = [1.8423299, 0.5188872, -1.7119213, -1.7013793]

# Docstring of modules/rng_philox.py in AUTOMATIC1111/stable-diffusion-webui, seed 0, shape (3, 4).
CUDA_SEED_0 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]

# Printed by torch on GPUs, as found in public code: torch.manual_seed(42), five times torch.randn(4, device="cuda") ...
CUDA_SEED_42_CALLS = [
    [0.1940, 2.1614, -0.1721, 0.8491],
    [0.1391, -0.1082, -0.7174, 0.7566],
    [-0.5187, 1.2268, 0.6255, -0.9117],
    [-0.6974, -1.8688, -0.8832, -1.6627],
    [-1.2682, -0.0383, -0.1029, 1.4400],
]
# ... and rows 7 and 9 of torch.randn((1823, 781), device="cuda")[0:10]: first three and last three columns.
CUDA_SEED_42_ROWS = {
    7: [1.9695, 0.5996, 0.5583, -0.0692, 2.9254, 0.9274],
    9: [-0.2987, 0.1946, 1.1640, -0.2081, -1.0439, 0.7082],
}


def test_cpu_stream_of_mixed_sizes_equals_torch() -> None:
    generator = Generator().manual_seed(7)
    for size, expected in zip(MIXED_SIZES, MIXED, strict=True):
        np.testing.assert_allclose(generator.randn((size,))[-3:], expected, rtol=0, atol=2e-6)


def test_cpu_takes_the_low_32_bits_of_a_seed() -> None:
    np.testing.assert_allclose(Generator().manual_seed(2**40 + 5).randn((16,))[:4], LONG_SEED, rtol=0, atol=2e-6)
    assert np.array_equal(Generator().manual_seed(2**40 + 5).randn((16,)), Generator().manual_seed(5).randn((16,)))


def test_cuda_equals_published_numbers() -> None:
    np.testing.assert_allclose(Generator("cuda").manual_seed(0).randn((3, 4)), CUDA_SEED_0, rtol=0, atol=2e-6)


def test_cuda_calls_continue_as_on_a_gpu() -> None:
    generator = Generator("cuda").manual_seed(42)
    drawn = [generator.randn((4,)) for _ in CUDA_SEED_42_CALLS]
    np.testing.assert_allclose(drawn, CUDA_SEED_42_CALLS, rtol=0, atol=6e-5)


@pytest.mark.parametrize("resident_threads", [None, 108 * 2048])
def test_cuda_rows_of_a_large_tensor(resident_threads: int | None) -> None:
    rows = Generator("cuda", resident_threads=resident_threads).manual_seed(42).randn((1823, 781))
    for row, expected in CUDA_SEED_42_ROWS.items():
        np.testing.assert_allclose(rows[row, [0, 1, 2, -3, -2, -1]], expected, rtol=0, atol=6e-5)


def test_philox_known_answer() -> None:
    """From kat_vectors of Random123 (Salmon et al. 2011): philox4x32, 10 rounds, counter and key 0."""
    words = philox_4x32((0, 0), np.zeros(1, np.uint64), 0)
    assert [int(word[0]) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_cuda_uses_all_64_bits_of_a_seed() -> None:
    low, high = (Generator("cuda").manual_seed(seed).randn((8,)) for seed in (5, 2**40 + 5))
    assert not np.allclose(low, high)


def test_cuda_beyond_the_resident_threads_each_thread_makes_four_numbers_of_a_counter() -> None:
    """The first 256 numbers are those of the uncapped layout; the next call starts where two counters were used."""
    capped = Generator("cuda", resident_threads=300)
    drawn = capped.randn((256 * 5,)).reshape(5, 256)
    free = Generator("cuda")
    first, second, third = (free.randn((256,)) for _ in range(3))
    assert np.array_equal(drawn[0], first)
    assert np.array_equal(drawn[4], second)
    assert np.array_equal(capped.randn((256,)), third)
    assert len(np.unique(drawn)) == drawn.size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_numbers_are_standard_normal(device: str) -> None:
    numbers = Generator(device, **({"resident_threads": 2048} if device == "cuda" else {})).randn((100_000,))
    assert numbers.dtype == np.float32
    assert abs(float(numbers.mean())) < 0.015
    assert abs(float(numbers.std()) - 1) < 0.015
    assert abs(float((numbers.astype(np.float64) ** 4).mean()) - 3) < 0.15


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (15,), (17,), (1, 4, 5, 7)])
def test_any_shape(device: str, shape: tuple[int, ...]) -> None:
    assert Generator(device).randn(shape).shape == shape


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_same_seed_same_bits_and_restart(device: str) -> None:
    generator = Generator(device)
    first = generator.manual_seed(3).randn((3, 5))
    generator.randn((2,))
    assert np.array_equal(first, generator.manual_seed(3).randn((3, 5)))
    assert generator.initial_seed() == 3
    assert generator.device == device


def test_a_new_generator_has_torchs_seed() -> None:
    assert Generator().initial_seed() == DEFAULT_SEED


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, "7", None, True, float("nan")])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(InvalidRequest, match="0 to 2") as caught:
        Generator().manual_seed(seed)  # type: ignore[arg-type]
    assert caught.value.parameter == "seed"


@pytest.mark.parametrize("seed", [0, MAX_SEED, np.uint64(MAX_SEED), np.int32(5)])
def test_good_seeds(seed: int) -> None:
    assert Generator("cuda").manual_seed(seed).initial_seed() == int(seed)


def test_unknown_device_lists_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="cpu, cuda"):
        Generator("mps")


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1024), ("cuda", 255)])
def test_resident_threads_belong_to_cuda(device: str, threads: int) -> None:
    with pytest.raises(InvalidRequest, match="256"):
        Generator(device, resident_threads=threads)


class TorchLike:
    device = "cuda:1"

    def initial_seed(self) -> int:
        return 11


def test_as_generator() -> None:
    own = Generator()
    assert as_generator(own) is own
    made = as_generator(TorchLike())
    assert (made.device, made.initial_seed()) == ("cuda", 11)
    with pytest.raises(InvalidRequest, match=r"torch\.Generator"):
        as_generator(object())


def test_image_i_has_seed_plus_i() -> None:
    made = image_generators(5, 3, "cuda")
    assert [(generator.device, generator.initial_seed()) for generator in made] == [
        ("cuda", 5),
        ("cuda", 6),
        ("cuda", 7),
    ]
    with pytest.raises(InvalidRequest):
        image_generators(MAX_SEED, 2)


def test_lists_must_match_the_count() -> None:
    own = Generator().manual_seed(9)
    made = image_generators([4, own, TorchLike()], 3)
    assert made[1] is own
    assert [generator.initial_seed() for generator in made] == [4, 9, 11]
    with pytest.raises(InvalidRequest, match="2 seeds or generators for 3 images"):
        image_generators([1, 2], 3)


def test_one_generator_is_drawn_from_in_turn() -> None:
    noise = stacked(image_generators(Generator().manual_seed(1), 2), (2, 4, 3, 3))()
    assert np.array_equal(noise, Generator().manual_seed(1).randn((2, 4, 3, 3)))


def test_stacked_images_are_those_made_alone() -> None:
    shape = (3, 4, 8, 8)
    noise = stacked(image_generators(20, 3), shape)
    first, second = noise(), noise()
    assert first.shape == shape
    for index in range(3):
        alone = stacked(image_generators(20 + index, 1), (1, 4, 8, 8))
        assert np.array_equal(alone()[0], first[index])
        assert np.array_equal(alone()[0], second[index])


def test_stacked_needs_a_generator_for_each_image() -> None:
    with pytest.raises(InvalidRequest, match="2 generators for 3 images"):
        stacked(image_generators(0, 2), (3, 4, 8, 8))


def test_random_seed_fits_32_bits() -> None:
    seeds = {random_seed() for _ in range(20)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)
