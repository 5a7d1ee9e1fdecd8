"""Footprints by subject: remembered ones, or measured now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pocketdiffusion.tuning.footprint import Footprint, Subject
from pocketdiffusion.tuning.store import Store
from pocketdiffusion.tuning.trial import TooLarge, measure

Say = Callable[[str], None]


class Footprints:
    """What graphs cost here. A graph that was too large for a limit is remembered with that limit."""

    def __init__(self, store: Store | None = None, measure: Callable[..., Footprint] = measure) -> None:
        self._store, self._measure = Store("footprints") if store is None else store, measure

    def known(self, subject: Subject) -> Footprint | None:
        """What is remembered. An opening from an engine's cache counts as long as the cache has it."""
        found = self._store.get(subject.key())
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            footprint = Footprint.from_json(found["footprint"])
            return footprint if footprint.kept is None or Path(footprint.kept).is_file() else None
        return None

    def exceeds(self, subject: Subject, limit: int) -> bool:
        """Whether it is remembered that a graph does not fit into a limit."""
        found = self._store.get(subject.key())
        return isinstance(found, dict) and isinstance(over := found.get("over"), int) and over >= limit

    def of(self, subject: Subject, say: Say, *, limit: int | None = None) -> Footprint | None:
        """The footprint, measured and remembered if it was not; None if it takes more than `limit` bytes.

        `say` is told before something is measured. Raises BackendError as `trial.measure`.
        """
        footprint = self.known(subject)
        if footprint is not None or (limit is not None and self.exceeds(subject, limit)):
            return footprint
        say(f"measuring {subject}")
        try:
            footprint = self._measure(subject, limit=limit)
        except TooLarge:
            self._store.put(subject.key(), {"over": limit})
            return None
        self.remember(subject, footprint)
        return footprint

    def remember(self, subject: Subject, footprint: Footprint) -> None:
        """Keep what was measured elsewhere."""
        self._store.put(subject.key(), {"footprint": footprint.to_json()})
