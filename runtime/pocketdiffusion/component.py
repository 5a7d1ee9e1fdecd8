"""Owns one graph: opens it when it is first used, checks what it gives, closes it by policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from pocketdiffusion import memory
from pocketdiffusion.backends.base import Backend, Session, SessionOptions, Weights
from pocketdiffusion.backends.rows import count_rows, fixed_batch, in_turn, joined
from pocketdiffusion.backends.streaming import open_parts
from pocketdiffusion.bundle.manifest import ComponentEntry
from pocketdiffusion.errors import BundleCorrupt, NonFinite
from pocketdiffusion.tensors import AnyArray, TensorSpec
from pocketdiffusion.timing import TimedSpan, Timings

UNUSED = ("return_dict",)
"""Inputs that old exporters left in their graphs and that change nothing; they are fed zeros."""

Residency = Literal["keep", "release", "stream"]
"""After `Component.use`: "keep" the graph in memory for the next call, or "release" it. "stream" releases it too, and
means graphs of which only a part is in memory at a time: see `backends.streaming`."""


class Component:
    """One graph of a bundle on one device. All methods may be called from several threads.

    Graphs of one image size each are components of their own, which the native size's holds: see `at`. A graph of a
    fixed batch runs in turn over more rows than that, and over fewer with copies of the last.

    Where the backend `fixes_shapes`, a graph with free axes is opened for one row of the shapes that `expect` named, or
    else of the first call; calls of other shapes open it anew, for any. So changing sizes cost one opening, and not
    one each.

    Timings: an opening goes to span "<name>.open" of the first run after it, each run to "<name>.run", and what a
    caller waited for an opening to "wait_open".
    """

    def __init__(
        self,
        name: str,
        graph: Path,
        entry: ComponentEntry,
        *,
        backend: Backend,
        device: str,
        options: SessionOptions | None = None,
        residency: Residency = "keep",
        sizes: Mapping[tuple[int, int], Component] | None = None,
        bands: Sequence[Component] = (),
    ) -> None:
        self.name, self.graph, self.entry = name, graph, entry
        self.sizes = {} if sizes is None else dict(sizes)
        """(width, height) in pixels -> the same for another size than this one's."""
        self.bands = tuple(bands)
        """The same in pieces, one for each of `entry.bands`."""
        self.backend, self.residency = backend, residency
        self.device = f"{backend.name}:{device}"
        self._device, self._precision, self._cached = device, "", False
        self._kept: Path | None = None
        self.options = SessionOptions() if options is None else options
        self._unused = {name: _zeros(spec) for name, spec in entry.inputs.items() if name in UNUSED}
        self._lock = threading.Lock()
        self._opening: Future[tuple[Session, TimedSpan]] | None = None
        self._reported = False
        self._users = 0
        self._shapes: Mapping[str, tuple[int, ...]] | None = None
        self.fixes = backend.fixes_shapes(device)
        """Whether it is opened for the shapes that `expect` named, so that opening ahead has to wait for them."""

    @property
    def streamed(self) -> bool:
        """Whether the graph is opened in parts."""
        return self.residency == "stream" and bool(self.entry.parts)

    @property
    def session(self) -> Session:
        """The opened graph; opens it, or waits for the thread that does. Raises BackendError or BundleCorrupt."""
        return self._opened()[0]

    @property
    def engine(self) -> str:
        """The engine and its version, e.g. "onnxruntime 1.31.1"."""
        return f"{self.backend.name} {self.backend.version()}"

    @property
    def precision(self) -> str:
        """The arithmetic that the graph really uses, or did when it was last open; opens it if it never was."""
        return self._precision or self.session.precision

    @property
    def cached(self) -> bool:
        """Whether the last opening came from the engine's cache; opens it if it never was."""
        return self._cached if self._precision else self.session.cached

    @property
    def kept(self) -> Path | None:
        """The file in the engine's cache that holds the graph as it was last open; opens it if it never was."""
        return self._kept if self._precision else self.session.kept

    def at(self, width: int, height: int) -> Component:
        """The component for an image size: one of `sizes`, else this one. The others are closed unless in use.

        Whatever the residency, one size is in memory at a time: sizes share a file of weights, and not their memory.
        """
        chosen = self.sizes.get((width, height), self)
        for other in (self, *self.sizes.values()):
            if other is not chosen and not other._users:
                other.close()
        return chosen

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Say which shapes the inputs of the next calls have, for the opening to come; rows count for nothing."""
        with self._lock:
            if self._opening is None and self.fixes:
                self._shapes = _one_row(shapes)

    def open_ahead(self) -> None:
        """Start to open the graph in a thread and return at once. An error is raised by the first use.

        Does nothing unless the residency is "keep": graphs opened before their turn would be in memory together. Nor
        does it before `expect` where that is of use.
        """
        if self.residency != "keep" or (self.fixes and self._shapes is None):
            return
        future, new = self._future()
        if new:
            threading.Thread(target=self._open_into, args=(future,), name=f"open {self.name}").start()

    def wait(self, timings: Timings) -> None:
        """Return when the graph is open. Raises what `session` raises."""
        opening = self._opening
        if opening is None or not opening.done():
            with timings.span("wait_open"):
                self._opened()

    def run(self, feeds: Mapping[str, AnyArray], timings: Timings | None = None) -> dict[str, AnyArray]:
        """All outputs by name, as arrays of the caller's own.

        Raises what `session` raises, GraphFailed for feeds that do not fit, and NonFinite.
        """
        self.expect({name: np.shape(array) for name, array in feeds.items()})
        if timings is not None:
            self.wait(timings)
        rows = count_rows(feeds)
        calls = in_turn(feeds, fixed_batch(self.session.inputs) or rows)
        if self._shapes is not None and not _takes(self.session, calls[0]):
            self._open_for_any()
            if timings is not None:
                self.wait(timings)
            calls = in_turn(feeds, fixed_batch(self.session.inputs) or rows)
        return joined([self._run(call, timings) for call in calls], rows)

    def _open_for_any(self) -> None:
        """Open the graph anew without fixed shapes. The session before is not closed: another thread may run it."""
        with self._lock:
            self._opening, self._shapes, self.fixes = None, None, False

    def _run(self, feeds: Mapping[str, AnyArray], timings: Timings | None) -> dict[str, AnyArray]:
        session, opening = self._opened()
        start = time.perf_counter()
        outputs = session.run({**self._unused, **feeds})
        seconds = time.perf_counter() - start
        if timings is not None:
            self._report_opening(timings, opening)
            timings.add(f"{self.name}.run", seconds, start)
        for output, array in outputs.items():
            bad = non_finite(array)
            if bad:
                raise NonFinite(
                    self.name,
                    output,
                    precision=session.precision,
                    device=session.device,
                    bad=bad,
                    size=array.size,
                )
        return outputs

    @contextmanager
    def use(self) -> Iterator[Component]:
        """Scope of use: when the last one ends, the graph is closed unless the residency is "keep"."""
        with self._lock:
            self._users += 1
        try:
            yield self
        finally:
            with self._lock:
                self._users -= 1
                last = self._users == 0
            if last and self.residency != "keep":
                self.close()

    def close(self) -> None:
        """Free the graph, waiting for an opening under way. Closing twice is allowed; the next use opens it again."""
        with self._lock:
            future, self._opening = self._opening, None
            self.fixes = self.backend.fixes_shapes(self._device)
        if future is not None and future.exception() is None:
            future.result()[0].close()
            memory.trim()

    def close_all(self) -> None:
        """`close` this, the graphs for other sizes and the pieces."""
        for part in (self, *self.sizes.values(), *self.bands):
            part.close()

    def hold(self, residency: Residency, weights: Weights) -> None:
        """Close this graph, those for other sizes and the pieces, and hold them in another way from then on.

        Of pieces, one at a time is open whatever the residency.
        """
        self.close_all()
        for part in (self, *self.sizes.values(), *self.bands):
            part.options = replace(part.options, weights=weights)
        for part in (self, *self.sizes.values()):
            part.residency = residency

    def _future(self) -> tuple[Future[tuple[Session, TimedSpan]], bool]:
        """The opening that is done or under way, and whether the caller must do it."""
        with self._lock:
            new = self._opening is None
            if self._opening is None:
                self._opening, self._reported = Future(), False
            return self._opening, new

    def _opened(self) -> tuple[Session, TimedSpan]:
        future, new = self._future()
        if new:
            self._open_into(future)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._opening is future and future.done():
                    self._opening = None  # the next use tries again
            raise

    def _open_into(self, future: Future[tuple[Session, TimedSpan]]) -> None:
        start = time.perf_counter()
        try:
            session = self._open(replace(self.options, shapes=self._shapes))
            self._compare(session)
            self._precision, self._cached, self._kept = session.precision, session.cached, session.kept
            memory.trim()
        except BaseException as error:  # whoever waits for the future raises it
            future.set_exception(error)
        else:
            future.set_result((session, TimedSpan(f"{self.name}.open", start, time.perf_counter() - start)))

    def _open(self, options: SessionOptions) -> Session:
        if not self.streamed:
            return self.backend.open(self.graph, self._device, options)
        bundle = self.graph.parents[len(PurePosixPath(self.entry.graph).parts) - 1]
        return open_parts(self.backend, bundle, self.entry, self._device, options)

    def _compare(self, session: Session) -> None:
        for kind, listed, found in (
            ("inputs", self.entry.inputs, session.inputs),
            ("outputs", self.entry.outputs, session.outputs),
        ):
            if set(listed) != set(found):
                session.close()
                raise BundleCorrupt(self.entry.graph, f"{kind} are {_names(found)}; the manifest says {_names(listed)}")

    def _report_opening(self, timings: Timings, opening: TimedSpan) -> None:
        with self._lock:
            first, self._reported = not self._reported, True
        if first:
            timings.spans.append(opening)


def non_finite(array: AnyArray) -> int:
    """How many values are NaN or infinite; 0 for types that have none."""
    if array.dtype.kind != "f":
        return 0
    finite = np.isfinite(array)
    return 0 if finite.all() else int(array.size - np.count_nonzero(finite))


def _zeros(spec: TensorSpec) -> AnyArray:
    return np.zeros(tuple(axis if isinstance(axis, int) else 1 for axis in spec.shape), spec.dtype)


def _one_row(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (1, *shape[1:]) if shape else () for name, shape in shapes.items()}


def _takes(session: Session, feeds: Mapping[str, AnyArray]) -> bool:
    """Whether the graph's fixed axes are those of the feeds."""
    return all(
        all(
            axis == length
            for axis, length in zip(spec.shape, np.shape(feeds[name]), strict=False)
            if isinstance(axis, int)
        )
        for name, spec in session.inputs.items()
        if name in feeds
    )


def _names(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(sorted(specs)) or "none"
