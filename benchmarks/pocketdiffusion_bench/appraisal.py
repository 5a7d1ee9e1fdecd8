"""Quality and rate of measured cases, once all are done: pictures against the reference's, arithmetic against the peak.

The reference of a case is, among those measured with it of the same model, size, steps, sampler, guidance, prompt and
seed, the one that is all float32 and leaves nothing out: ours before Diffusers', Diffusers' before others. A case has
the size, steps and so on that its configuration says. Pictures of other noise are not compared: they would differ by
all that noise decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_bench import quality
from pocketdiffusion_bench.case import OURS, Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.flops import step_flops
from pocketdiffusion_bench.models import RANDOM
from pocketdiffusion_bench.rate import peak, rate
from pocketdiffusion_bench.record import OK, Quality, Rate, Record

NOISE = "torch-cpu"
"""The noise that ours draws, and the word of a peer's configuration for the same."""
TWICE = ("heun", "dpm2", "dpm2 a", "dpm++ 2s a", "dpm++ sde")
"""Samplers that evaluate the denoiser twice in most steps."""
PREFERRED = (OURS, "diffusers")
SLOW_PROBE = "more than the peak: something else slowed the matrix-product probe down"


class Measured(Protocol):
    """What is left of a measurement, such as `run.Job`."""

    case: Case
    bundle: Path | None
    """What ours opened; None for a peer."""
    picture: Path | None

    def record(self) -> Record:
        """What was found."""
        ...


def appraise(measured: Sequence[Measured], say: Callable[[str], None]) -> list[Record]:
    """Each measurement's record, with quality and rate where they can be had; `say` tells why one can't."""
    found = [(job, job.record()) for job in measured]
    return [_appraised(job, record, found, say) if record.status == OK else record for job, record in found]


Found = Sequence[tuple[Measured, Record]]
Say = Callable[[str], None]


def _appraised(job: Measured, record: Record, found: Found, say: Say) -> Record:
    made = _rate(record, found, say)
    doubts = () if made is None or made.share <= 1 else (SLOW_PROBE,)
    return replace(record, quality=_quality(job, record, found, say), rate=made, flags=(*record.flags, *doubts))


def _quality(job: Measured, record: Record, found: Found, say: Say) -> Quality | None:
    own = None if job.bundle is None else Bundle.open(job.bundle)
    sqnr = {} if own is None else quality.component_sqnr(own)
    random = record.case.model.startswith(RANDOM) or (own is not None and quality.has_random_weights(own))
    reference = _reference(record, found)
    if job.picture is not None and reference is not None and reference[0].picture is not None:
        label = reference[1].case.label
        try:
            return quality.compare(job.picture, reference[0].picture, label=label, sqnr_db=sqnr, random_weights=random)
        except BenchError as error:
            say(f"{record.case.label}: not compared with {label}: {error}")
    return Quality("torch float32, at export", sqnr_db=sqnr, random_weights=random) if sqnr else None


def _reference(record: Record, found: Found) -> tuple[Measured, Record] | None:
    """The best reference for a record, which can be itself."""
    if _noise(record) != NOISE:
        return None
    fit = [each for each in found if _is_float32(each[1]) and _work(each[1]) == _work(record)]
    order = {peer: place for place, peer in enumerate(PREFERRED)}
    return min(fit, key=lambda each: order.get(each[1].case.peer, len(order)), default=None)


def _is_float32(record: Record) -> bool:
    used = record.configuration
    computed = record.status == OK and record.case.exact and record.case.downsample_keys is None
    return computed and (used.get("precision"), used.get("recipe")) == ("float32", "fp32")


def _work(record: Record) -> tuple[Any, ...]:
    """What two pictures that can be compared have in common."""
    case, used = record.case, record.configuration
    sizes = (used.get("width"), used.get("height"), used.get("steps"), used.get("guidance"))
    return (case.model, case.prompt, case.seed, case.sampler, _noise(record), *sizes)


def _noise(record: Record) -> Any:
    return NOISE if record.case.peer == OURS else record.configuration.get("noise")


def _rate(record: Record, found: Found, say: Say) -> Rate | None:
    used = record.configuration
    try:
        device = str(used.get("device")).rpartition(":")[2]
        flops = _flops(record, _bundle(record, found))
        return rate(record, flops, peak(str(used.get("precision")), device, record.case.threads))
    except PocketDiffusionError as error:
        say(f"{record.case.label}: no rate: {error}")
        return None


def _bundle(record: Record, found: Found) -> Bundle:
    """One of the record's model and keys, with whatever recipe. Raises BenchError."""
    for job, other in found:
        same = (other.case.model, other.case.downsample_keys) == (record.case.model, record.case.downsample_keys)
        if same and job.bundle is not None:
            return Bundle.open(job.bundle)
    raise BenchError("no bundle of ours was measured with it, whose graph could be counted")


def _flops(record: Record, bundle: Bundle) -> float:
    """Operations of the denoiser in one span "step" of the record. Raises BenchError."""
    used = record.configuration
    names = ("width", "height", "steps", "guidance")
    if not record.case.exact:
        raise BenchError(f"preset {record.case.preset} leaves out work, more in some steps than in others")
    missing = [name for name in names if used.get(name) is None]
    steps, pictures = len(record.samples("step")), len(record.samples("image"))
    if missing or not steps or not pictures:
        raise BenchError(f"its process did not tell its {', '.join(missing) or 'steps'}")
    once = step_flops(bundle, width=used["width"], height=used["height"], guidance=used["guidance"])
    # Peers tell how often they evaluated the denoiser for a picture; some of their steps are single evaluations.
    evaluations = used.get("evaluations") or used["steps"] * (2 if used.get("sampler") in TWICE else 1)
    return float(once * evaluations * pictures / steps)
