"""Graphs with the names and layouts of Apple's ml-stable-diffusion, in the words of this project and of optimum.

Such graphs have a fixed number of rows (images): more are run in turn, missing ones are filled up with copies of the
last. Text states are (rows, width, 1, tokens) there and (rows, tokens, width) here; the timestep is one number here and
one for each row there. A UNet may be two models. Apple's names: `noise_pred`; `z` -> `image`; `x` -> `latent`;
`pooled_outputs`, `hidden_embeds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pocketdiffusion.tensors import AnyArray, TensorSpec

Specs = Mapping[str, TensorSpec]
Feeds = dict[str, AnyArray]
Execute = Callable[[Feeds], Feeds]

UNET = {"noise_pred": "out_sample"}
VAE_DECODER = {"z": "latent_sample", "image": "sample"}
VAE_ENCODER = {"x": "sample", "latent": "latent_parameters"}
STATES, TIMESTEP, IDS, POOLED, PENULTIMATE = (
    "encoder_hidden_states",
    "timestep",
    "input_ids",
    "pooled_outputs",
    "hidden_embeds",
)
FIRST_CHUNK, SECOND_CHUNK = "Chunk1", "Chunk2"
"""End the names of the two models that a UNet may be made of."""
LAYER, OUR_LAYER = "hidden_states_", "hidden_states."
"""States after a layer, in exports of this project beside Apple's; a Core ML name holds no dot."""
OWN: tuple[tuple[set[str], set[str]], ...] = (
    ({"clip_input"}, {"special_scores", "concept_scores"}),
    ({"input_ids"}, {"text_embeds"}),
    ({"pixel_values"}, {"image_embeds", "features"}),
)
"""Inputs and outputs of graphs that Apple has none of, the safety checker's and the judge's: only their rows are fixed
as the others' are."""
OUR_POOLED = ("text_embeds", "pooler_output")
"""With and without a projection."""


Model = tuple[Specs, Specs, str, Execute]
"""Inputs, outputs, precision, and what computes the ones from the others."""


def chunks(graph: Path) -> tuple[Path, ...]:
    """The models that a graph is made of, of which the first names it."""
    if not graph.stem.endswith(FIRST_CHUNK):
        return (graph,)
    return graph, graph.with_name(f"{graph.stem.removesuffix(FIRST_CHUNK)}{SECOND_CHUNK}{graph.suffix}")


def chained(models: Sequence[Model]) -> Model:
    """Models that run one after another as one: each takes inputs of the whole and what those before it gave."""
    inputs: dict[str, TensorSpec] = {}
    made: set[str] = set()
    for given, outputs, _, _ in models:
        inputs |= {name: spec for name, spec in given.items() if name not in made}
        made |= outputs.keys()

    def run(feeds: Feeds) -> Feeds:
        known, found = dict(feeds), Feeds()
        for given, _, _, execute in models:
            found = execute({name: known[name] for name in given})
            known |= found
        return found

    precision = next((precision for _, _, precision, _ in models if precision != "float32"), "float32")
    return inputs, models[-1][1], precision, run


def renamed(inputs: Specs, outputs: Specs) -> dict[str, str] | None:
    """Apple's name -> ours, for what is called otherwise; None for graphs that are not in Apple's form."""
    if STATES in inputs and len(inputs[STATES].shape) == 4:
        return UNET
    for names in (VAE_DECODER, VAE_ENCODER):
        if set(inputs) == {next(iter(names))}:
            return names
    if set(inputs) == {IDS} and POOLED in outputs:
        layers = {name: OUR_LAYER + name[len(LAYER) :] for name in outputs if name.startswith(LAYER)}
        return layers or {POOLED: OUR_POOLED[0] if PENULTIMATE in outputs else OUR_POOLED[1]}
    return {} if (set(inputs), set(outputs)) in OWN else None


def described(inputs: Specs, outputs: Specs) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs as `translated` gives them. Graphs that are not in Apple's form stay as they are."""
    names = renamed(inputs, outputs)
    if names is None:
        return dict(inputs), dict(outputs)
    given, made = (
        {names.get(name, name): _free(name, spec) for name, spec in side.items()} for side in (inputs, outputs)
    )
    if any(name.startswith(OUR_LAYER) for name in made):  # and so Apple's are copies of ours
        made = {name: spec for name, spec in made.items() if name not in (PENULTIMATE, POOLED)}
    return given, made


def translated(
    inputs: Specs, outputs: Specs, execute: Execute
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec], Execute]:
    """A graph's inputs and outputs in our words, and a function that takes and gives them for any number of rows."""
    names = renamed(inputs, outputs)
    if names is None:
        return dict(inputs), dict(outputs), execute
    known, (given, made) = names, described(inputs, outputs)
    rows = max(size for spec in inputs.values() for size in spec.shape[:1] if isinstance(size, int))

    def run(feeds: Feeds) -> Feeds:
        count = max(len(array) for array in feeds.values() if array.ndim)
        parts = [execute(part(feeds, start, min(start + rows, count))) for start in range(0, count, rows)]
        joined = {known.get(key, key): np.concatenate([found[key] for found in parts])[:count] for key in parts[0]}
        return {key: joined[key] for key in made}

    def part(feeds: Feeds, start: int, stop: int) -> Feeds:
        chosen = np.minimum(np.arange(start, start + rows), stop - 1)
        return {name: _laid_out(name, feeds[known.get(name, name)], chosen) for name in inputs}

    return given, made, run


def _free(name: str, spec: TensorSpec) -> TensorSpec:
    if name == TIMESTEP:
        return TensorSpec(spec.dtype, ())
    shape = spec.shape
    if name == STATES and len(shape) == 4:
        shape = (shape[0], shape[3], shape[1])
    return TensorSpec(spec.dtype, ("batch", *shape[1:]))


def _laid_out(name: str, array: AnyArray, rows: AnyArray) -> AnyArray:
    if name == TIMESTEP:
        return np.full(len(rows), array, array.dtype)
    chosen = array[rows]
    return np.ascontiguousarray(chosen.transpose(0, 2, 1)[:, :, np.newaxis]) if name == STATES else chosen
