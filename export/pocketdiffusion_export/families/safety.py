"""The safety checker of Stable Diffusion: CLIP's vision encoder and its nearness to a list of concepts, as a graph.

The graph gives scores and leaves the decision to the runtime, where Diffusers' rounding can be followed to the letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pocketdiffusion.safety import COMPONENT
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import Call, ComponentSpec, Feeds
from pocketdiffusion_export.families.clip import transformer_layer
from pocketdiffusion_export.families.parts import config_of


def safety_checker(model: Any) -> ComponentSpec:
    """`clip_input`, [batch, 3, side, side], to `special_scores` and `concept_scores`, [batch, concepts].

    A score is the cosine of picture and concept less the concept's threshold.
    """

    def scores(pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.nn.functional.normalize(model.visual_projection(pooled))
        special, concepts = (
            image @ torch.nn.functional.normalize(embeds).t() - thresholds
            for embeds, thresholds in (
                (model.special_care_embeds, model.special_care_embeds_weights),
                (model.concept_embeds, model.concept_embeds_weights),
            )
        )
        return special, concepts

    outputs, rows = ("special_scores", "concept_scores"), {0: "batch"}
    side = model.config.vision_config.image_size
    return ComponentSpec(
        name=COMPONENT,
        module=Call(model, lambda pixels: scores(_encode(model.vision_model.vision_model, pixels))),
        reference=lambda pixels: scores(model.vision_model(pixels)[1]),
        inputs=("clip_input",),
        outputs=outputs,
        axes={name: rows for name in ("clip_input", *outputs)},
        example=(torch.zeros(2, 3, side, side),),
        config=config_of(model),
    )


def safety_samples(pipe: Any, images: Sequence[AnyArray]) -> list[Feeds]:
    """Inputs from pictures, [batch, 3, height, width] in [-1, 1], through the source's own preprocessing."""
    feeds = []
    for batch in images:
        pictures = pipe.image_processor.postprocess(torch.from_numpy(batch), output_type="pil")
        feeds.append({"clip_input": pipe.feature_extractor(pictures, return_tensors="np").pixel_values})
    return feeds


@contextmanager
def unchecked(pipe: Any) -> Iterator[None]:
    """No picture of the pipeline is checked, and so none is black instead of what the model draws."""
    checker = getattr(pipe, COMPONENT, None)
    if checker is not None:
        pipe.safety_checker = None
    try:
        yield
    finally:
        if checker is not None:
            pipe.safety_checker = checker


def _encode(vision: Any, pixels: torch.Tensor) -> torch.Tensor:
    """CLIP's vision transformer in the exported form, from the source's own layers; its pooled state."""
    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers:
        x = transformer_layer(layer, x)
    pooled: torch.Tensor = vision.post_layernorm(x[:, 0])
    return pooled
