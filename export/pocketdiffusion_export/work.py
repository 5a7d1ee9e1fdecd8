"""The work on components: trace, quantize, write, verify, cut; for an export, or for what is added to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pocketdiffusion.bundle.manifest import ComponentEntry, SizedGraph
from pocketdiffusion.golden import sqnr_db
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export import read_back, verify
from pocketdiffusion_export.bands import DECODER, add_bands
from pocketdiffusion_export.component import ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.parts import cut_component
from pocketdiffusion_export.plan import ExportPlan
from pocketdiffusion_export.quant import QUANTIZERS
from pocketdiffusion_export.registry import lookup
from pocketdiffusion_export.sizes import GraphPlan, Shapes, Size, fixed_shapes, graph_plans
from pocketdiffusion_export.targets.onnx import TARGET as ONNX
from pocketdiffusion_export.targets.onnx_upsample import fold_upsampling

Say = Callable[[str], None]
Item = TypeVar("Item")

FOLDING = frozenset({"onnx", "openvino"})
"""Targets whose engines were seen to be faster with folded upsampling; pieces for bands are cut at a Resize."""
MAX_SAMPLES = 64
"""Inputs per component that verification runs, evenly spaced over the source's own."""
MAX_SAMPLE_VALUES = 1 << 20
"""Numbers in them all; a large component gets fewer samples, but no fewer than `MIN_SAMPLES`."""
MIN_SAMPLES = 3
HALF_DB = 65.0
"""What a golden output must keep in float16 to be held so."""
MAX_BYTES_ON_ALL = 2 << 30
"""Larger components are verified on the main engine only: OpenVINO maps an ONNX file beside its own copy of it."""


@dataclass
class Draft:
    """A bundle that is being assembled."""

    target: Any
    engines: tuple[str, ...]
    """Those that verify it, the main one first."""
    destination: Path
    folder: Path
    """Where it is assembled."""
    entries: dict[str, ComponentEntry] = field(default_factory=dict)
    weights: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """Component -> SQNR of each of its weights, read back from a graph that no engine here opens."""
    measured: list[verify.Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else was found, for people."""


@dataclass(frozen=True)
class _Graph:
    """One graph of a component: what it is fixed to, and what it is verified with."""

    size: Size | None
    shapes: Shapes
    samples: Sequence[Feeds]
    expected: Sequence[Mapping[str, AnyArray]]
    whole: Shapes
    """`shapes` for static graphs: batch and text length are fixed as well."""

    def calls(self, engine: str) -> tuple[Sequence[Feeds], Sequence[Mapping[str, AnyArray]]]:
        """Inputs and expected outputs for an engine; a graph that is read back is slow to compute."""
        count = read_back.SAMPLES if engine == read_back.ENGINE else len(self.samples)
        return _evenly(self.samples, count), _evenly(self.expected, count)

    def file(self, first: str) -> str:
        """Its name in the component's folder; `first` is that of the native size's."""
        stem, dot, kind = first.rpartition(".")
        return first if self.size is None else "{}_{}x{}{}{}".format(stem, *self.size, dot, kind)


class Work:
    """The components of one export, one after another, and what is learnt from them."""

    def __init__(self, plan: ExportPlan, drafts: Sequence[Draft], say: Say) -> None:
        self.plan, self.drafts, self.say = plan, drafts, say
        self.golden: dict[str, AnyArray] = {}
        self.quantization: dict[str, Any] = {}

    def component(self, spec: ComponentSpec, samples: Sequence[Feeds]) -> None:
        """Trace, quantize, write and verify one component. Raises ExportError when it misses its threshold."""
        name, batch = spec.name, self.plan.batch_of(spec.name)
        plans = graph_plans(spec, samples, self.plan.sizes, batch)
        self.say(f"running {name} in torch on {sum(len(_spread(plan.samples)) for plan in plans)} inputs")
        graphs = [self._graph(spec, plan) for plan in plans]
        self._keep_golden(name, graphs[0])
        self._write(spec, samples, graphs)
        del spec
        for draft in self.drafts:
            self._verify(draft, name, graphs)

    def _graph(self, spec: ComponentSpec, plan: GraphPlan) -> _Graph:
        used = _spread(plan.samples)
        expected = verify.references(spec, used)
        fixed = bool(self.plan.sizes)
        shapes = fixed_shapes(spec, used[0] | expected[0], batch=self.plan.batch is not None) if fixed else {}
        whole = fixed_shapes(spec, used[0] | expected[0], batch=True) if fixed else {}
        return _Graph(plan.size, shapes, used, expected, whole)

    def _write(self, spec: ComponentSpec, samples: Sequence[Feeds], graphs: Sequence[_Graph]) -> None:
        recipe, (first, *others) = self.plan.recipe, graphs
        self.say(f"exporting {spec.name}")
        model = ONNX.trace(spec, release=True)
        if FOLDING.issuperset(self.plan.targets) and not (self.plan.bands and spec.name == DECODER):
            fold_upsampling(model)
        unread = any(read_back.ENGINE in draft.engines for draft in self.drafts)
        source = read_back.keep_weights(model, self.drafts[0].folder) if unread else {}
        if recipe.method is not None:
            self.say(f"quantizing {spec.name} to {recipe.weights}")
            quantize = lookup(QUANTIZERS, "quantization method", recipe.method)
            self.quantization[spec.name] = asdict(quantize(model, recipe, _evenly(samples, MAX_SAMPLES)))
        for draft in self.drafts:
            target, place = draft.target, draft.target.place(spec.name)
            shapes = first.whole if target.static else first.shapes
            names = {graph.file(target.graph): graph for graph in others}
            target.save(model, draft.folder / place, shapes, {n: graph.shapes for n, graph in names.items()})
            inputs, outputs = target.describe(model, shapes)
            draft.entries[spec.name] = ComponentEntry(
                format=draft.target.format,
                graph=place,
                inputs=inputs,
                outputs=outputs,
                weights=recipe.weights,
                sizes=tuple(
                    SizedGraph(*graph.size, f"{spec.name}/{name}", *target.describe(model, graph.shapes))
                    for name, graph in names.items()
                    if graph.size is not None
                ),
            )
            if read_back.ENGINE in draft.engines:
                self.say(f"reading {place} back")
                draft.weights[spec.name] = read_back.compare(draft.folder / place, draft.entries[spec.name], source)

    def _verify(self, draft: Draft, name: str, graphs: Sequence[_Graph]) -> None:
        recipe, entry = self.plan.recipe, draft.entries[name]
        folder, native = (draft.folder / entry.graph).parent, entry.graph.rpartition("/")[2]
        large = sum(file.stat().st_size for file in folder.iterdir()) > MAX_BYTES_ON_ALL
        engines = draft.engines[:1] if large else draft.engines
        self.say(f"verifying {name} ({draft.target.format}) on {', '.join(engines)}")
        measured = [
            verify.measure(_label(name, g), folder / g.file(native), engine, *g.calls(engine))
            for g in graphs
            for engine in engines
        ]
        worst = min(item.sqnr_db for item in measured)
        if worst < recipe.min_sqnr_db:
            miss(self.plan, self.say, name, "SQNR", worst, recipe.min_sqnr_db)
        draft.measured += measured
        floor = verify.floor_for(worst, recipe.min_sqnr_db)
        if read_back.ENGINE in engines:  # the figure is no engine's
            draft.entries[name] = replace(entry, min_sqnr_db=read_back.floor(recipe.weights, floor))
        else:
            draft.entries[name] = replace(entry, sqnr_db=round(worst, 2), min_sqnr_db=floor)
        if self.plan.part_bytes is not None:
            self.say(f"cutting {name} ({draft.target.format})")
            samples = {f"{name}/{g.file(native)}": g.calls(read_back.ENGINE)[0] for g in graphs}
            cut = cut_component(draft.folder, draft.entries[name], self.plan.part_bytes, samples, engines)
            draft.entries[name], notes = cut
            draft.notes += notes

        if self.plan.bands and name == DECODER:
            self.say(f"cutting {name} for bands, and comparing them with the whole")
            draft.entries[name], note = add_bands(draft.folder, draft.entries[name], graphs[0].samples, engines)
            draft.notes.append(note)

    def _keep_golden(self, name: str, graph: _Graph) -> None:
        middle, exact = len(graph.samples) // 2, self.plan.recipe.method is None
        for key, array in graph.samples[middle].items():
            self.golden[f"{name}/in/{key}"] = np.array(array, order="C")
        for key, array in graph.expected[middle].items():
            self.golden[f"{name}/out/{key}"] = np.array(array if exact else _halved(array), order="C")


def _label(name: str, graph: _Graph) -> str:
    return name if graph.size is None else "{} {}x{}".format(name, *graph.size)


def miss(plan: ExportPlan, say: Say, what: str, figure: str, found: float, demanded: float) -> None:
    """Raise ExportError for a figure in dB under what is demanded, or only say so where the plan accepts it."""
    text = f"{what} reaches {found:.1f} dB {figure}, recipe {plan.recipe.name} demands {demanded:g} dB"
    if not plan.accept_error:
        raise ExportError(
            f"{text}; nothing was written. Try another recipe, or --accept-error to write it nevertheless"
        )
    say(f"accepted: {text}")


def _halved(array: AnyArray) -> AnyArray:
    """In float16, where that is nearer to the array than quantized weights come: half the golden file."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() and sqnr_db(array, half) > HALF_DB else array


def _spread(samples: Sequence[Feeds]) -> list[Feeds]:
    """Samples to verify with."""
    values = max(sum(array.size for array in feeds.values()) for feeds in samples)
    return _evenly(samples, min(MAX_SAMPLES, max(MIN_SAMPLES, MAX_SAMPLE_VALUES // values)))


def _evenly(samples: Sequence[Item], count: int) -> list[Item]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index)] for index in np.linspace(0, len(samples) - 1, count)]
