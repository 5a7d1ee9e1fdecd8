"""The CPU generator against torch itself. CUDA numbers are frozen in the unit test: they need a GPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pocketdiffusion.noise import Generator, as_generator, image_generators, stacked  # noqa: E402

pytestmark = pytest.mark.torch

TOLERANCE = 2e-6


def difference(ours: object, theirs: object) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max(initial=0))


@pytest.mark.parametrize("seed", [step * 0x0D79435E50D79435 % 2**64 for step in range(20)])
def test_a_million_numbers(seed: int) -> None:
    theirs = torch.randn(10**6, generator=torch.Generator().manual_seed(seed))
    assert difference(Generator().manual_seed(seed).randn((10**6,)), theirs) < TOLERANCE


def test_every_size_from_0_to_300() -> None:
    for size in range(300):
        theirs = torch.randn(size, generator=torch.Generator().manual_seed(size))
        assert difference(Generator().manual_seed(size).randn((size,)), theirs) < TOLERANCE


def test_consecutive_calls_of_mixed_sizes() -> None:
    ours, theirs = Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for size in np.random.default_rng(0).integers(0, 60, 1000).tolist():
        assert difference(ours.randn((size,)), torch.randn(size, generator=theirs)) < TOLERANCE


def test_as_generator_restarts_a_torch_generator_and_leaves_it_alone() -> None:
    theirs = torch.Generator().manual_seed(99)
    expected = torch.randn((1, 4, 8, 8), generator=theirs)
    state = theirs.get_state()
    assert difference(as_generator(theirs).randn((1, 4, 8, 8)), expected) < TOLERANCE
    assert torch.equal(theirs.get_state(), state)


def test_default_seed() -> None:
    assert Generator().initial_seed() == torch.Generator().initial_seed()


@pytest.mark.parametrize("several", [False, True])
def test_a_batch_as_diffusers_draws_it(several: bool) -> None:
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    shape = (3, 4, 5, 7)
    seeds = [5, 6, 7]
    theirs = [torch.Generator().manual_seed(seed) for seed in seeds] if several else torch.Generator().manual_seed(5)
    ours = image_generators(seeds if several else Generator().manual_seed(5), 3)
    draw = stacked(ours, shape)
    for _ in range(2):
        assert difference(draw(), randn_tensor(shape, generator=theirs)) < TOLERANCE
