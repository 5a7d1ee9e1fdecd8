"""Which graph files a foreign folder holds, and which of several variants is taken.

The order without a name: ``model.onnx``, ``openvino_model.xml``, then suffixed files from the most to the least precise
(`ORDER`), then others by name. A variant asked for by name is used or refused; a component that lacks what another has
takes its default, which is said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pocketdiffusion.bundle.foreign.configs import INDEX, PREPROCESSOR, names_in
from pocketdiffusion.bundle.strict_json import short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported

CHECKER = "safety_checker"
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", CHECKER)
OPTIONAL = ("text_encoder_2", "vae_encoder", CHECKER)
PLAIN = "default"
ORDER = (PLAIN, "openvino", "fp32", "fp16", "int8", "uint8", "quantized", "q8", "int4", "q4", "q4f16", "bnb4")

_ONNX = re.compile(r"model(?:[._-]([A-Za-z0-9_]{1,40}))?\.onnx")
_OPENVINO = "openvino_model.xml"


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph file."""

    path: str
    """Relative to the folder."""
    format: str
    variant: str
    """The suffix, or PLAIN."""


def graph_files(root: Path) -> dict[str, list[Graph]]:
    """For each of COMPONENTS the graphs that are there, best first."""
    return {name: sorted(_graphs(root, name), key=_rank) for name in COMPONENTS}


def choose_graphs(
    root: Path, variant: str | None, *, checked: bool = False
) -> tuple[dict[str, Graph], tuple[str, ...]]:
    """The graph of each component, and notes for people. `checked` takes the safety checker's too.

    Raises BundleUnsupported, BundleCorrupt.
    """
    files = graph_files(root)
    there = {name: graphs for name, graphs in files.items() if graphs and (checked or name != CHECKER)}
    if missing := [name for name in COMPONENTS if name not in there and name not in OPTIONAL]:
        raise BundleCorrupt(root, f"has no graph for {', '.join(missing)}; found: {_listing(there)}")
    if variant is not None and all(graph.variant != variant for graphs in there.values() for graph in graphs):
        raise BundleUnsupported(f"{root} has no variant {short(variant)}; it has {_listing(there)}")
    chosen = {name: _choose(graphs, variant) for name, graphs in there.items()}
    notes = [
        f"{name}: variant {graph.variant}; there is no {variant or 'plain model.onnx'} for it"
        for name, graph in chosen.items()
        if graph.variant not in (variant or PLAIN, "openvino")
    ]
    if files[CHECKER] and not checked:
        notes.append(
            f"pictures are not checked: the folder's {CHECKER} is not named in {INDEX}, or {PREPROCESSOR} is missing"
        )
    return chosen, tuple(notes)


def _graphs(root: Path, component: str) -> list[Graph]:
    found = []
    for name in names_in(root / component):
        if match := _ONNX.fullmatch(name):
            found.append(Graph(f"{component}/{name}", "onnx", match[1] or PLAIN))
        elif name == _OPENVINO:
            found.append(Graph(f"{component}/{name}", "openvino", "openvino"))
    return found


def _rank(graph: Graph) -> tuple[int, str]:
    return (ORDER.index(graph.variant) if graph.variant in ORDER else len(ORDER), graph.variant)


def _choose(graphs: list[Graph], variant: str | None) -> Graph:
    return next((graph for graph in graphs if graph.variant == variant), graphs[0])


def _listing(there: dict[str, list[Graph]]) -> str:
    return (
        "; ".join(f"{name}: {', '.join(graph.variant for graph in graphs)}" for name, graphs in there.items()) or "none"
    )
