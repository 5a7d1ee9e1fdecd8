"""CLIP text encoders as graphs, in the form that engines run fastest.

Limit: encoders that take no attention mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pocketdiffusion_export.component import Call, ComponentSpec
from pocketdiffusion_export.families.parts import config_of
from pocketdiffusion_export.forms import attend, attend_masked

MAX_CLIP_SKIP = 4

Tensors = tuple[torch.Tensor, ...]


def clip_skips(model: Any) -> range:
    """Numbers of last layers that the text encoder can leave out: 1 to 4, or fewer in a shallow one."""
    return range(1, min(MAX_CLIP_SKIP, model.config.num_hidden_layers - 1) + 1)


def text_encoder(model: Any) -> ComponentSpec:
    """SD 1.x and 2.x: final-normed states, also with layers left out (`clip_skip_N`)."""
    skips = clip_skips(model)
    norm = model.text_model.final_layer_norm

    def outputs(last: torch.Tensor, pooled: torch.Tensor, states: Tensors) -> Tensors:
        return last, pooled, *(norm(states[-(skip + 1)]) for skip in skips)

    names = ("last_hidden_state", "pooler_output", *(f"clip_skip_{skip}" for skip in skips))
    return _spec("text_encoder", model, names, outputs)


def layered_text_encoder(name: str, model: Any) -> ComponentSpec:
    """SDXL: the states after every layer as they are, with optimum's names. With a projection `text_embeds` too."""
    projects = hasattr(model, "text_projection")

    def outputs(last: torch.Tensor, pooled: torch.Tensor, states: Tensors) -> Tensors:
        return (model.text_projection(pooled), last, *states) if projects else (last, pooled, *states)

    first = ("text_embeds", "last_hidden_state") if projects else ("last_hidden_state", "pooler_output")
    names = (*first, *(f"hidden_states.{index}" for index in range(model.config.num_hidden_layers + 1)))
    return _spec(name, model, names, outputs, {"output_hidden_states": True})


def projected_text_encoder(name: str, model: Any) -> ComponentSpec:
    """Only the pooled state in the space that the model shares with a picture encoder: `text_embeds`."""
    return _spec(name, model, ("text_embeds",), lambda last, pooled, states: (model.text_projection(pooled),))


def _spec(
    name: str,
    model: Any,
    outputs: tuple[str, ...],
    select: Callable[[torch.Tensor, torch.Tensor, Tensors], Tensors],
    config: dict[str, Any] | None = None,
) -> ComponentSpec:
    """`select` makes the outputs of the final-normed state, the pooled one, and the states of all layers."""

    def reference(ids: torch.Tensor) -> Tensors:
        out = model.text_model(ids, output_hidden_states=True)
        return select(out.last_hidden_state, out.pooler_output, out.hidden_states)

    states = {0: "batch", 1: "length"}
    axes = {output: {0: "batch"} if output in ("pooler_output", "text_embeds") else states for output in outputs}
    ids = torch.full((2, model.config.max_position_embeddings), model.config.eos_token_id, dtype=torch.int64)
    return ComponentSpec(
        name=name,
        module=Call(model, lambda ids: select(*_encode(model, ids))),
        reference=reference,
        inputs=("input_ids",),
        outputs=outputs,
        axes={"input_ids": states, **axes},
        example=(ids,),
        config=config_of(model) | (config or {}),
    )


def _encode(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """CLIP's text transformer in the exported form, from the source's own layers."""
    text, length = model.text_model, model.config.max_position_embeddings
    causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    mask = causal[:, :, : ids.shape[1], : ids.shape[1]]
    states = [text.embeddings(input_ids=ids)]
    for layer in text.encoder.layers:
        states.append(transformer_layer(layer, states[-1], mask))
    last = text.final_layer_norm(states[-1])
    return last, _pool(model.config.eos_token_id, last, ids), tuple(states)


def transformer_layer(layer: Any, state: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """One layer of CLIP's text or vision transformer in the exported form."""
    own, x = layer.self_attn, layer.layer_norm1(state)
    parts = own.q_proj(x) * own.scale, own.k_proj(x), own.v_proj(x), own.num_heads
    attended = attend(*parts) if mask is None else attend_masked(*parts, mask)
    x = state + own.out_proj(attended)
    result: torch.Tensor = x + layer.mlp(layer.layer_norm2(x))
    return result


def _pool(end: int, last: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The state at the first end token. Configs of old SD models say 2 by mistake: there the largest id ends."""
    found = ids if end == 2 else (ids == end)
    first = found.to(torch.int32).argmax(-1)
    pooled: torch.Tensor = last.gather(1, first[:, None, None].expand(-1, 1, last.shape[2]))[:, 0]
    return pooled
