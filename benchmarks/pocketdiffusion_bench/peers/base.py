"""What a peer is: another runtime that makes pictures from the same weights, in an environment of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.sampling import SAMPLERS, SCHEDULES
from pocketdiffusion.sampling.names import CLASSES, sampler_and_schedule
from pocketdiffusion_bench import models
from pocketdiffusion_bench.case import OURS_ONLY, Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.peers.venv import Environment

RUNNERS = Path(__file__).with_name("runners")
SCHEDULERS = {sampler: name for name, sampler in reversed(CLASSES.items())}
"""Our samplers -> Diffusers' classes; of several the first in `CLASSES`."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer. `check` says in one line what of a case it can't honour; nothing is silently replaced."""

    name: str
    description: str
    environment: Environment
    runner: str
    """Script in `runners/`, run by the environment's Python."""
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    """Arithmetic that can be asked for; the runner takes the first where none is."""
    recipes: tuple[str, ...]
    """Storage of weights that can be asked for; the first where none is."""
    samplers: Mapping[str, str]
    """Our samplers -> the peer's own names."""
    prepare: Callable[[Peer, Case], Mapping[str, Any]]
    """Settings for the runner, above all "model"; converts the model, once, where the peer needs that."""
    converters: tuple[Environment, ...] = ()
    """Environments of tools that only convert models for it."""

    def check(self, case: Case) -> None:
        """Raises BenchError for the first thing asked that this peer can't do."""
        for field, allowed in (("device", self.devices), ("precision", self.precisions), ("recipe", self.recipes)):
            asked = getattr(case, field)
            if asked is not None and asked not in allowed:
                raise BenchError(
                    f"{self.name} has no {field} '{asked}'; it has: {', '.join(allowed) or 'its own only'}"
                )
        for field in OURS_ONLY:
            asked = getattr(case, field)
            if asked is not None:
                raise BenchError(f"{self.name} has no {field} '{asked}'; that is pocketdiffusion's own setting")
        self.sampler(case)

    def sampler(self, case: Case) -> str | None:
        """The peer's name of the case's sampler; None for the model's own. Raises BenchError."""
        if case.sampler is None:
            return None
        try:
            name, schedule = sampler_and_schedule(case.sampler, SAMPLERS, SCHEDULES)
        except InvalidRequest as error:
            raise BenchError(str(error)) from None
        if schedule is not None or name not in self.samplers:
            raise BenchError(f"{self.name} has no sampler '{case.sampler}'; it has: {', '.join(sorted(self.samplers))}")
        return self.samplers[name]

    def precision(self, case: Case) -> str | None:
        """What the runner is to compute in; None where it can't be chosen."""
        return case.precision or next(iter(self.precisions), None)

    def recipe(self, case: Case) -> str:
        """How the weights are stored."""
        return case.recipe or self.recipes[0]

    def bundle(self, case: Case, graphs: str) -> dict[str, Any]:
        """Settings for a bundle of ours that this peer reads: one whose graphs are of that kind. Raises BenchError."""
        bundle = Bundle.open(find_bundle(case.model))
        kinds = {entry.format for entry in bundle.manifest.components.values()}
        if kinds != {graphs}:
            raise BenchError(f"{self.name} reads {graphs} graphs; {case.model} holds {', '.join(sorted(kinds))}")
        recipe = bundle.manifest.recipe
        if case.recipe not in (None, recipe):
            raise BenchError(f"{case.model} is stored as {recipe}, asked for {case.recipe}; leave --recipe out")
        return {"model": str(bundle.path), "graphs": "pocketdiffusion bundle", "recipe": recipe}

    def require(self, case: Case) -> None:
        """Make sure that the case can run: checks it, finds the environment, makes or converts the model.

        Raises PeerUnavailable, and BenchError for what can't be honoured or made.
        """
        self.check(case)
        self.environment.python()
        self.prepare(self, case)

    def command(self, case: Case, *, events: Path, image: Path, images: int) -> list[str]:
        """The measured process. What the case leaves open is settled as for ours (`models.settled`)."""
        command = [str(self.environment.python()), "-E", "-s", str(RUNNERS / self.runner)]
        command += ["--case", json.dumps(models.settled(case).to_json())]
        command += ["--settings", json.dumps(dict(self.prepare(self, case)))]
        return [*command, "--events", str(events), "--image", str(image), "--images", str(images)]
