"""Where to cut a graph into a chain of parts: few parts, and little that is handed on between them.

Of any graph format only what flows where counts. Three kinds of operations: those that follow from constants alone
(dequantized weights) and those that a part repeats rather than be handed their outputs (shapes, quantized copies), and
all others, each of which runs in exactly one part. A part's weights are the constants that its operations read.
Dynamic programming over the places to cut, as in breaking a text into lines (Knuth and Plass 1981), gives the fewest
parts, and of those chains the one whose cuts are crossed by the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Op:
    """One operation."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    repeated: bool = False
    """Whether each part that needs the outputs computes them itself."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A graph, as far as cutting it goes."""

    ops: Sequence[Op]
    """In an order in which they can run."""
    outputs: tuple[str, ...]
    weights: Mapping[str, int]
    """Stored bytes of each constant."""
    crossing: Mapping[str, int]
    """Bytes of each tensor that may be handed on from part to part; only their ratios count."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a graph."""

    ops: tuple[int, ...]
    """Indices of its operations, in order."""
    inputs: tuple[str, ...]
    """Inputs of the graph and outputs of earlier parts."""
    outputs: tuple[str, ...]
    """What later parts need, and outputs of the graph."""
    weight_bytes: int


def cut(flow: Flow, limit: int) -> list[Piece]:
    """The parts of a graph, each reading at most `limit` bytes of constants.

    A part is larger where nothing in it may be handed on, such as one large layer. One part is the whole graph.
    """
    sources = _Sources(flow)
    steps = [index for index, op in enumerate(flow.ops) if index not in sources.repeated]
    reads = [sources.read_by(index) for index in steps]
    bounds = _places(flow, sources, steps, reads)
    chosen = _fewest(flow, reads, bounds, limit)
    return [_piece(flow, sources, steps, reads, start, stop) for start, stop in pairwise(chosen)]


class _Sources:
    """What a tensor is made of in a part that does not get it: constants, inputs and outputs of other parts."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.maker = {name: index for index, op in enumerate(flow.ops) for name in op.outputs}
        self.repeated: set[int] = set()
        self._leaves: dict[str, frozenset[str]] = {}
        constant = set(flow.weights)
        for index, op in enumerate(flow.ops):
            fixed = all(name in constant for name in op.inputs) and bool(op.inputs)
            if fixed:
                constant.update(op.outputs)
            if fixed or op.repeated:
                self.repeated.add(index)
                leaves = frozenset().union(*map(self.leaves, op.inputs))
                self._leaves.update(dict.fromkeys(op.outputs, leaves))

    def leaves(self, name: str) -> frozenset[str]:
        """All that a tensor is made of by repeated operations; a tensor that none makes is its own."""
        return self._leaves.get(name, frozenset((name,)))

    def read_by(self, index: int) -> frozenset[str]:
        """All that an operation reads."""
        return frozenset().union(*map(self.leaves, self.flow.ops[index].inputs))

    def helpers(self, names: Sequence[str]) -> set[int]:
        """The repeated operations that make these tensors."""
        found: set[int] = set()
        waiting = list(names)
        while waiting:
            index = self.maker.get(waiting.pop())
            if index is not None and index in self.repeated and index not in found:
                found.add(index)
                waiting += self.flow.ops[index].inputs
        return found


def _last_reads(flow: Flow, sources: _Sources, reads: Sequence[frozenset[str]]) -> dict[str, int]:
    """Tensor -> the last step that reads it; outputs of the graph are read after all steps."""
    last = {name: place for place, names in enumerate(reads) for name in names}
    ends = frozenset().union(*map(sources.leaves, flow.outputs))
    return last | dict.fromkeys(ends, len(reads))


def _places(
    flow: Flow, sources: _Sources, steps: Sequence[int], reads: Sequence[frozenset[str]]
) -> list[tuple[int, int]]:
    """(how many steps stand before it, bytes that cross it) of each place where the graph may be cut, ends included."""
    last = _last_reads(flow, sources, reads)
    places, live = [(0, 0)], dict[str, int]()
    for place, index in enumerate(steps[:-1]):
        live |= {name: last[name] for name in flow.ops[index].outputs if name in last}
        live = {name: until for name, until in live.items() if until > place}
        if all(name in flow.crossing for name in live):
            places.append((place + 1, sum(flow.crossing[name] for name in live)))
    return [*places, (len(steps), 0)]


def _fewest(flow: Flow, reads: Sequence[frozenset[str]], places: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """The places of the best chain, both ends included."""
    spans = [frozenset().union(*reads[start:stop]) for (start, _), (stop, _) in pairwise(places)]
    weights = [{name: flow.weights[name] for name in names if name in flow.weights} for names in spans]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    """For each place: parts before it, bytes crossing all cuts before it, the place before it in the chain."""
    for stop in range(1, len(places)):
        held: dict[str, int] = {}
        options: list[tuple[int, int, int]] = []
        for start in range(stop - 1, -1, -1):
            held |= weights[start]
            if options and sum(held.values()) > limit:
                break
            count, crossed, _ = best[start]
            options.append((count + 1, crossed + places[start][1], start))
        best.append(min(options))
    chain = [len(places) - 1]
    while chain[-1]:
        chain.append(best[chain[-1]][2])
    return [places[index][0] for index in reversed(chain)]


def _piece(
    flow: Flow, sources: _Sources, steps: Sequence[int], reads: Sequence[frozenset[str]], start: int, stop: int
) -> Piece:
    own, final = set(steps[start:stop]), stop == len(steps)
    ends = [name for name in flow.outputs if final and sources.maker.get(name) in sources.repeated]
    wanted = [name for index in own for name in flow.ops[index].inputs] + ends
    ops = sorted(own | sources.helpers(wanted))
    made = {name for index in ops for name in flow.ops[index].outputs}
    used = dict.fromkeys(name for index in ops for name in flow.ops[index].inputs if name)
    later = frozenset(flow.outputs).union(*reads[stop:], *(() if final else map(sources.leaves, flow.outputs)))
    return Piece(
        ops=tuple(ops),
        inputs=tuple(name for name in used if name not in made and name not in flow.weights),
        outputs=tuple(
            name
            for index in ops
            for name in flow.ops[index].outputs
            if (name in later and index in own) or name in ends
        ),
        weight_bytes=sum(flow.weights[name] for name in used if name in flow.weights),
    )
