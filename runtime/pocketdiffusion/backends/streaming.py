"""Graphs in parts, of which few are in memory at a time: for models that are larger than the memory.

They run one after another on any backend: while one runs, the next is opened in a thread, and a part that has run is
closed, which frees its weights. Weights stay as they are stored ("compact"), because to turn them
into float32 for one run costs more time than it saves, and four times the memory. Every part is opened once a run,
whatever the number of rows: they go through a part in turn, so that it never holds the activations of more than one.
Between the parts, only tensors that a later part reads are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from pocketdiffusion import memory
from pocketdiffusion.backends.base import Backend, Session, SessionOptions
from pocketdiffusion.backends.feeds import check_feeds
from pocketdiffusion.backends.rows import count_rows, fixed_batch, in_turn, joined
from pocketdiffusion.backends.session import label
from pocketdiffusion.bundle.manifest import ComponentEntry, GraphPart
from pocketdiffusion.errors import BundleCorrupt, GraphFailed
from pocketdiffusion.tensors import AnyArray, TensorSpec

Shapes = Mapping[str, tuple[int, ...]]


def open_parts(
    backend: Backend, bundle: Path, entry: ComponentEntry, device: str, options: SessionOptions
) -> StreamedSession:
    """Open the first of the parts that `entry` has below `bundle`. Raises as the backend does, and BundleCorrupt."""

    def open_part(part: GraphPart, shapes: Shapes | None) -> Session:
        identity = options.identity and f"{options.identity} {part.graph}"
        chosen = replace(options, weights="compact", identity=identity, shapes=shapes, passing=True)
        session = backend.open(bundle / part.graph, device, chosen)
        if session.inputs.keys() != part.inputs.keys() or session.outputs.keys() != part.outputs.keys():
            session.close()
            raise BundleCorrupt(part.graph, "has other inputs or outputs than the manifest says")
        return session

    memory.return_large_blocks()
    return StreamedSession(label(bundle / entry.graph), entry, _Parts(entry.parts, open_part, options.shapes))


class StreamedSession:
    """A `Session` over the parts of one graph. Runs from several threads go one after another.

    It takes any number of rows, whatever its parts are fixed to. `device`, `precision`, `cached` and `kept` are those
    of the first part, when it was opened first.
    """

    def __init__(self, name: str, entry: ComponentEntry, parts: _Parts) -> None:
        first = parts.get(0)
        self.device, self.precision = first.device, first.precision
        self.cached, self.kept = first.cached, first.kept
        self.inputs: Mapping[str, TensorSpec] = {
            key: _any_rows(first.inputs.get(key, spec), parts.shape(key)) for key, spec in entry.inputs.items()
        }
        self.outputs: Mapping[str, TensorSpec] = {key: _any_rows(spec) for key, spec in entry.outputs.items()}
        self._label, self._parts, self._chain = name, parts, entry.parts
        self._batch = fixed_batch(entry.inputs) or 1
        self._kept = _kept(entry)
        self._lock = threading.Lock()
        self._ran = self._closed = False

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """All outputs by name. Raises as a part's opening and its run do; the session stays usable."""
        checked = check_feeds(self._label, feeds, self.inputs)
        with self._lock:
            if self._closed:
                raise GraphFailed(f"{self._label}: the session is closed; open the graph again")
            calls = in_turn(checked, self._batch)
            try:
                for index in range(len(self._chain)):
                    self._run_part(index, calls)
            except BaseException:
                self._parts.close()
                raise
            self._ran = True
        return joined(calls, count_rows(checked))

    def close(self) -> None:
        """Free all parts, after a run or an opening under way. Closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._parts.close()

    def _run_part(self, index: int, calls: Sequence[dict[str, AnyArray]]) -> None:
        """Every call's tensors before a part become those after it."""
        session = self._parts.get(index)
        if index + 1 < len(self._chain):
            self._parts.open_ahead(index + 1)
        elif self._ran:  # who ran it twice will run it again; a text encoder runs once
            self._parts.open_ahead(0)
        for tensors in calls:
            made = session.run({name: tensors[name] for name in self._chain[index].inputs})
            self._parts.learn(made)
            tensors |= made
            for name in tensors.keys() - self._kept[index]:
                del tensors[name]
        del made
        self._parts.done(index)


class _Parts:
    """Which parts are open. One thread opens, one part after another; the caller is another thread.

    With `shapes` of the whole's inputs, parts are opened for the shapes of what they are handed: the first time when
    the parts before have run, and from then on ahead.
    """

    def __init__(
        self,
        parts: Sequence[GraphPart],
        open_part: Callable[[GraphPart, Shapes | None], Session],
        shapes: Shapes | None,
    ) -> None:
        self._parts, self._open_part = parts, open_part
        self._shapes = None if shapes is None else dict(shapes)
        self._open: dict[int, Future[Session]] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """What a tensor's shape is fixed to, if that is known."""
        return None if self._shapes is None else self._shapes.get(name)

    def learn(self, tensors: Mapping[str, AnyArray]) -> None:
        """Take note of the shapes that parts make."""
        if self._shapes is not None:
            self._shapes |= {name: array.shape for name, array in tensors.items()}

    def open_ahead(self, index: int) -> None:
        """Open a part in a thread, if it is not open, and the shapes that it shall be opened for are known."""
        if self._shapes is None or self._parts[index].inputs.keys() <= self._shapes.keys():
            self._begin(index)

    def _begin(self, index: int) -> None:
        if index not in self._open:
            future, part = Future[Session](), self._parts[index]
            shapes = None if self._shapes is None else {n: self._shapes[n] for n in part.inputs if n in self._shapes}
            threading.Thread(target=self._open_into, args=(part, shapes, future), name=f"open {part.graph}").start()
            self._open[index] = future  # not before the thread is there: others wait for it

    def get(self, index: int) -> Session:
        """An open part; waits for the thread that opens it. Raises what that raised, and then it can be tried again."""
        self._begin(index)
        try:
            return self._open[index].result()
        except BaseException:
            del self._open[index]
            raise

    def done(self, index: int) -> None:
        """Close a part that ran."""
        self._close([index])

    def close(self) -> None:
        """Close all."""
        self._close(list(self._open))

    def _close(self, indices: Sequence[int]) -> None:
        futures = [self._open.pop(index) for index in indices]
        for future in futures:
            if future.exception() is None:  # waits for an opening under way
                future.result().close()
        del futures  # and with them the sessions
        memory.trim()

    def _open_into(self, part: GraphPart, shapes: Shapes | None, future: Future[Session]) -> None:
        try:
            future.set_result(self._open_part(part, shapes))
        except BaseException as error:  # whoever waits for the future raises it
            future.set_exception(error)


def _kept(entry: ComponentEntry) -> list[frozenset[str]]:
    """For each part what must be kept behind it: what later parts read, and the whole's outputs."""
    kept = [frozenset(entry.outputs)]
    for part in reversed(entry.parts[1:]):
        kept.append(kept[-1] | part.inputs.keys())
    return kept[::-1]


def _any_rows(spec: TensorSpec, shape: tuple[int, ...] | None = None) -> TensorSpec:
    """With a free first axis, and the others as in `shape` if there is one."""
    axes = spec.shape if shape is None else shape
    return TensorSpec(spec.dtype, (None, *axes[1:])) if len(axes) > 1 else spec
