from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.sampling import SAMPLERS
from pocketdiffusion.sampling.scheduler import sampling_plan
from pocketdiffusion_bench import appraisal
from pocketdiffusion_bench.appraisal import TWICE, appraise
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.rate import Peak
from pocketdiffusion_bench.record import FAILED, Record

from .bench_records import make_record, make_run

USED: dict[str, Any] = {
    "device": "onnxruntime:cpu",
    "precision": "float32",
    "recipe": "fp32",
    "width": 64,
    "height": 64,
    "steps": 2,
    "guidance": 3.5,
    "sampler": "euler",
}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
FLOPS, PEAK = 1e9, 4e9


@dataclass
class Measured:
    case: Case
    bundle: Path | None
    picture: Path | None
    found: Record

    def record(self) -> Record:
        return self.found


@pytest.fixture
def measured(tmp_path: Path) -> Callable[..., Measured]:
    """A case that made a picture of one colour: two pictures of two steps of 1 s."""

    def make(colour: int = 100, case: Case | None = None, **used: Any) -> Measured:
        case = case or Case("sticker")
        file = tmp_path / f"{case.peer}-{colour}-{len(list(tmp_path.iterdir()))}.png"
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(file)
        run = make_run([[1.0, 1.0], [1.0, 1.0]])
        record = make_record([run], case, quality=None, rate=None, configuration={**USED, **used})
        return Measured(case, find_bundle("sticker") if case.peer == "pocketdiffusion" else None, file, record)

    return make


@pytest.fixture(autouse=True)
def _known_arithmetic(monkeypatch):
    def step_flops(bundle, *, width, height, guidance):
        return FLOPS * (2 if guidance > 1 else 1) * width * height / 64**2

    monkeypatch.setattr(appraisal, "step_flops", step_flops)
    monkeypatch.setattr(
        appraisal, "peak", lambda precision, device, threads: Peak(PEAK, f"{precision} {device} {threads}")
    )


def silent(line: str) -> None:
    raise AssertionError(line)


def test_pictures_are_compared_with_the_float32_case_of_the_same_work(measured):
    jobs = [
        measured(110, Case("sticker", precision="bfloat16"), precision="bfloat16"),
        measured(100),
        measured(100, Case("sticker", steps=3), steps=3),
    ]
    other, reference, alone = appraise(jobs, silent)
    assert other.quality is not None and reference.quality is not None and alone.quality is not None
    assert other.quality.reference == reference.case.label
    assert other.quality.psnr_db == pytest.approx(10 * np.log10(255**2 / 10**2))
    assert (reference.quality.reference, reference.quality.psnr_db) == (reference.case.label, 99.0)
    assert alone.quality.reference == alone.case.label, "another number of steps is other work"
    assert other.quality.sqnr_db["unet"] > 30 and not other.quality.random_weights


def test_what_leaves_work_out_is_no_reference_and_has_no_rate(measured):
    said: list[str] = []
    jobs = [measured(110, Case("sticker", preset="fast")), measured(100, Case("sticker", preset="exact"))]
    fast, exact = appraise(jobs, said.append)
    assert fast.quality is not None and exact.quality is not None and exact.rate is not None
    assert fast.quality.reference == exact.case.label and fast.rate is None
    assert said == [
        "sticker preset=fast: no rate: preset fast leaves out work, more in some steps than in others",
    ]


def test_without_a_reference_there_is_what_the_manifest_says(measured):
    (found,) = appraise([measured(recipe="int8")], silent)
    assert found.quality is not None and found.quality.psnr_db is None
    assert found.quality.reference == "torch float32, at export" and found.quality.sqnr_db


def test_ours_is_the_reference_before_diffusers_and_that_before_others(measured):
    peers = [measured(value, Case("sticker", peer), noise="torch-cpu") for value, peer in ((1, "x"), (2, "diffusers"))]
    for jobs, label in (([*peers, measured(3)], "sticker"), (peers, "diffusers sticker")):
        found = appraise(jobs, lambda line: None)
        assert {record.quality.reference for record in found if record.quality} == {label}
        assert all(record.quality for record in found)


def test_other_noise_is_not_compared(measured):
    jobs = [measured(), measured(90, Case("sticker", "other"), noise="its own"), measured(90, Case("sticker", "mute"))]
    _, other, mute = appraise(jobs, silent)
    assert other.quality is None and mute.quality is None


def test_random_weights_are_labelled(measured):
    job = measured(90, Case("random:sd15", "diffusers"), noise="torch-cpu")
    (found,) = appraise([job], lambda line: None)
    assert found.quality is not None and found.quality.random_weights


def test_failed_cases_stay_as_they_are_and_are_no_reference(measured):
    job = measured()
    job.found = replace(job.found, status=FAILED, error="ended with 1")
    found, other = appraise([job, measured(90, precision="bfloat16")], silent)
    assert found == job.found
    assert other.quality is not None and other.quality.psnr_db is None


def test_pictures_of_two_sizes_lose_the_comparison_and_nothing_else(measured):
    jobs = [measured(), measured(case=Case("sticker", threads=1))]
    Image.new("RGB", (8, 8)).save(jobs[1].picture)
    said: list[str] = []
    found = appraise(jobs, said.append)[1]
    assert said and "not compared with sticker: the picture is 8x8 and the reference's, sticker, is 16x16" in said[0]
    assert found.quality is not None and found.quality.psnr_db is None and found.rate is not None


@pytest.mark.parametrize(
    ("used", "flops"),
    [
        ({}, 2 * FLOPS),
        ({"guidance": 1.0}, FLOPS),
        ({"width": 128}, 4 * FLOPS),
        ({"sampler": "heun"}, 4 * FLOPS),
        ({"sampler": "heun", "evaluations": 3}, 3 * FLOPS),
    ],
    ids=str,
)
def test_the_arithmetic_of_a_step(measured, used, flops):
    (found,) = appraise([measured(**used)], silent)
    assert found.rate is not None
    assert (found.rate.flops_per_step, found.rate.achieved, found.rate.peak) == (flops, flops, PEAK)
    assert found.rate.probe == "float32 cpu None"


def test_a_peers_arithmetic_is_counted_by_a_bundle_of_ours(measured):
    peer = measured(90, Case("sticker", "diffusers", threads=2), noise="torch-cpu")
    assert appraise([measured(), peer], silent)[1].rate is not None
    said: list[str] = []
    assert appraise([peer], said.append)[0].rate is None
    assert said == [
        "diffusers sticker threads=2: no rate: no bundle of ours was measured with it, whose graph could be counted"
    ]


@pytest.mark.parametrize(("best", "doubts"), [(2.0 * FLOPS, 0), (1.9 * FLOPS, 1)])
def test_a_probe_that_was_slower_than_the_model_is_flagged(measured, monkeypatch, best, doubts):
    monkeypatch.setattr(appraisal, "peak", lambda *_: Peak(best, "probe"))
    job = measured()
    (found,) = appraise([job], silent)
    assert found.flags == (*job.found.flags, *[appraisal.SLOW_PROBE] * doubts)


def test_what_has_no_rate_says_why(measured, monkeypatch):
    said: list[str] = []
    assert appraise([measured(guidance=None)], said.append)[0].rate is None

    def none(*_: Any) -> Peak:
        raise BenchError("no engine here computes in ggml q8_0")

    monkeypatch.setattr(appraisal, "peak", none)
    assert appraise([measured()], said.append)[0].rate is None
    assert said == [
        "sticker: no rate: its process did not tell its guidance",
        "sticker: no rate: no engine here computes in ggml q8_0",
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_that_evaluate_twice(sampler):
    calls = 0

    def denoise(x, sigma):
        nonlocal calls
        calls += 1
        return x * 0.1

    plan = sampling_plan(SCHEDULER, sampler=sampler)
    levels = plan.levels(20)
    x = np.ones((1, 1, 2, 2), np.float32)
    steps = list(plan.run(denoise, x, levels, lambda: np.zeros_like(x)))
    assert round(calls / len(steps)) == (2 if sampler in TWICE else 1)
