"""Finds what runs a bundle fastest here, once, by measuring; remembers it for "auto".

What is remembered counts for the bundle's exact contents, an image size and a number of threads, as long as the same
devices are here and the engines that are chosen have the versions that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from pocketdiffusion.backends import BACKENDS, Choice, available, load, parse_devices, role_value
from pocketdiffusion.backends.base import SessionOptions, Weights
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.components import choose_devices
from pocketdiffusion.errors import BackendError, BackendUnavailable, BundleUnsupported, InvalidRequest
from pocketdiffusion.tuning.choice import Candidate, Measured, best, can_be_compact, wanted_db
from pocketdiffusion.tuning.footprint import Footprint, Subject, machine
from pocketdiffusion.tuning.footprints import Say
from pocketdiffusion.tuning.shapes import denoiser_rows, entry_at, input_shapes
from pocketdiffusion.tuning.store import Store
from pocketdiffusion.tuning.trial import measure

MAX_LOSS = 1.0
"""dB of SQNR that a choice may lose to float32, unless something else is asked."""
ROUNDS = 2
HOPELESS = 2.0
"""A candidate this many times slower than the best in float32 is not measured a second time."""
Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was measured of a bundle at a size."""

    measured: tuple[Measured, ...]
    max_loss: float
    devices: tuple[str, ...]
    """Every device that was here, as "engine:device"."""
    versions: Mapping[str, str]
    """Of the engines."""

    def choose(
        self, *, precisions: Mapping[str, str] | None = None, weights: Weights | None = None
    ) -> dict[str, Measured] | None:
        """The best for each component among candidates with the precisions, by role, and weights given; or None."""
        return best(
            [
                item
                for item in self.measured
                if weights in (None, item.candidate.weights)
                and (precisions is None or role_value(precisions, item.component) == item.candidate.precision)
            ]
        )


def tune(
    bundle: Bundle,
    *,
    size: Size | None = None,
    threads: int | None = None,
    max_loss: float = MAX_LOSS,
    rounds: int = ROUNDS,
    say: Say = lambda line: None,
    measure: Callable[..., Footprint] = measure,
) -> Tuning:
    """Measure every candidate of each component, taking turns, and remember it. `size` is the model's by default.

    `say` is told what is being measured. Raises BundleUnsupported for a bundle that nothing vouches for,
    BackendUnavailable where no engine opens it, and InvalidRequest for a size that the model can't draw.
    """
    if not bundle.hashed or bundle.manifest.golden is None:
        raise BundleUnsupported(
            f"{bundle.manifest.name} holds no golden tensors, without which a choice's error can't be told; "
            "`pocketdiffusion export` makes a bundle that does"
        )
    found: list[Measured] = []
    for name in bundle.manifest.components:
        found += _component(bundle, name, _size(bundle, size), threads, max_loss, rounds, say, measure)
    versions = {item.candidate.backend: load(item.candidate.backend).version() for item in found}
    tuning = Tuning(tuple(found), max_loss, _devices(bundle), versions)
    value = {
        "measured": [item.to_json() for item in found],
        "max_loss": max_loss,
        "devices": tuning.devices,
        "versions": versions,
    }
    Store("tuned").put(_key(bundle, _size(bundle, size), threads), value)
    return tuning


def remembered(bundle: Bundle, *, size: Size | None = None, threads: int | None = None) -> Tuning | None:
    """What `tune` found for a bundle at a size on this machine with these devices; None if it was not run."""
    found = Store("tuned").get(_key(bundle, _size(bundle, size), threads))
    with suppress(TypeError, KeyError, AttributeError):
        measured = tuple(Measured.from_json(item) for item in found["measured"])
        tuning = Tuning(measured, found["max_loss"], tuple(found["devices"]), found["versions"])
        return tuning if tuning.devices == _devices(bundle) else None
    return None


def tuned_choices(
    bundle: Bundle,
    device: str | Mapping[str, str],
    *,
    size: Size | None,
    threads: int | None,
    precisions: Mapping[str, str] | None,
    weights: Weights | None,
) -> dict[str, Choice]:
    """The choices of `choose_devices` with what `tune` found in place of those that "auto" made.

    Only candidates of given `precisions`, by role, and `weights` count; None leaves them open. Raises as that does.
    """
    choices, roles = choose_devices(bundle, device), parse_devices(device)
    automatic = [name for name in choices if role_value(roles, name) == "auto"]
    tuning = remembered(bundle, size=size, threads=threads) if automatic and bundle.hashed else None
    chosen = None if tuning is None else tuning.choose(precisions=precisions, weights=weights)
    if tuning is None or chosen is None or not _same_engines(tuning, chosen):
        return choices
    return {name: _choice(chosen[name].candidate) if name in automatic else choice for name, choice in choices.items()}


def _choice(candidate: Candidate) -> Choice:
    weights = ", compact weights" if candidate.weights == "compact" else ""
    reason = f"the fastest by tune, {candidate.precision}{weights}"
    return Choice(candidate.backend, candidate.device, reason, candidate.precision, candidate.weights)


def _same_engines(tuning: Tuning, chosen: Mapping[str, Measured]) -> bool:
    """Whether what is chosen has the versions that were measured; no other engine is imported to learn its own."""
    engines = {item.candidate.backend for item in chosen.values()}
    return all(load(engine).version() == tuning.versions[engine] for engine in engines)


def candidates(bundle: Bundle, component: str) -> list[Candidate]:
    """Every device, precision and way to hold weights with which a component can be opened here.

    Raises BackendUnavailable where there is none.
    """
    entry = bundle.manifest.components[component]
    ways: tuple[Weights, ...] = ("fast", "compact") if can_be_compact(entry) else ("fast",)
    found = [
        Candidate(info.backend, info.device, precision, weights)
        for info in available()
        if entry.format in info.formats
        for precision in load(info.backend).precisions(info.device)
        for weights in ways
    ]
    if not found:
        raise BackendUnavailable(f"{component} ({entry.format}): no engine here opens it; see pocketdiffusion devices")
    return found


def subject_of(bundle: Bundle, component: str, candidate: Candidate, size: Size, threads: int | None) -> Subject:
    """What is measured of a candidate: the component as one picture of that size needs it."""
    entry = entry_at(bundle, component, size)
    rows = denoiser_rows(entry, bundle.manifest.numbers.default_guidance)
    contents = f"{bundle.digest} {entry.graph}"
    return Subject(
        component=component,
        graph=bundle.path / entry.graph,
        entry=entry,
        contents=contents,
        backend=candidate.backend,
        device=candidate.device,
        options=SessionOptions(threads, candidate.precision, candidate.weights, identity=contents),
        shapes=input_shapes(bundle, component, width=size[0], height=size[1], rows=rows),
    )


def _component(
    bundle: Bundle,
    name: str,
    size: Size,
    threads: int | None,
    max_loss: float,
    rounds: int,
    say: Say,
    measure: Callable[..., Footprint],
) -> Iterator[Measured]:
    entry = bundle.manifest.components[name]
    golden = bundle.file(bundle.manifest.golden or "")
    subjects = {each: subject_of(bundle, name, each, size, threads) for each in candidates(bundle, name)}
    found: dict[Candidate, list[Footprint]] = {}
    errors: dict[Candidate, str] = {}
    for turn in range(rounds):
        exact = [_merged(each).run for candidate, each in found.items() if candidate.precision == "float32"]
        for candidate, subject in subjects.items():
            if turn and (candidate in errors or _merged(found[candidate]).run > HOPELESS * min(exact, default=inf)):
                continue
            say(f"measuring {subject}")
            try:
                footprint = measure(subject, golden=golden)
            except BackendError as error:
                errors[candidate] = str(error)
            else:
                found.setdefault(candidate, []).append(footprint)
    merged = {candidate: _merged(each) for candidate, each in found.items() if candidate not in errors}
    sources = [footprint for candidate, footprint in merged.items() if candidate.precision == "float32"]
    wanted = wanted_db(sources, entry.min_sqnr_db, max_loss)
    runs = bundle.manifest.numbers.default_steps if "timestep" in entry.inputs else 1
    for candidate in subjects:
        yield Measured(name, candidate, runs, merged.get(candidate), errors.get(candidate), wanted)


def _merged(found: Sequence[Footprint]) -> Footprint:
    """One footprint of several processes': the least of their times, which a busy machine makes longer."""
    names = ("loading", "opening", "first", "run")
    return replace(found[0], **{name: min(getattr(each, name) for each in found) for name in names})


def _size(bundle: Bundle, size: Size | None) -> Size:
    numbers = bundle.manifest.numbers
    if size is None:
        return numbers.width, numbers.height
    if not isinstance(size, (tuple, list)) or [type(side) for side in size] != [int, int]:
        raise InvalidRequest("size", f"size is {size!r}; give (width, height) in pixels, e.g. (512, 512), or None")
    return size


def _devices(bundle: Bundle) -> tuple[str, ...]:
    """Every device here that opens a format of the bundle."""
    formats = {entry.format for entry in bundle.manifest.components.values()}
    engines = [load(name) for name in BACKENDS if formats & set(load(name).formats)]
    return tuple(f"{engine.name}:{device}" for engine in engines for device in engine.devices())


def _key(bundle: Bundle, size: Size, threads: int | None) -> dict[str, Any]:
    return {"bundle": bundle.digest, "size": list(size), "threads": threads, "machine": machine()}
