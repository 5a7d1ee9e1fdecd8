"""The judge: a text encoder and a picture encoder into one space, as two graphs.

Limits: CLIP's text encoder, which reads the tokens of the pipeline's own tokenizer, and a ResNet whose labels are the
space and which takes square pictures in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pocketdiffusion.image import resize
from pocketdiffusion.judge import COMPONENTS, IMAGE, TEXT
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import Call, ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families.clip import projected_text_encoder
from pocketdiffusion_export.families.parts import config_of


def judge(pipe: Any) -> tuple[ComponentSpec, ...]:
    """Both encoders of a pipeline that has them, or none. Raises ExportError for two that don't fit together."""
    if not has_judge(pipe):
        return ()
    text, image = (getattr(pipe, name) for name in COMPONENTS)
    widths = text.config.projection_dim, image.config.num_labels
    if not isinstance(getattr(image.config, "image_size", None), int):
        raise ExportError(
            "the judge_image's config.json names no image_size: the side in pixels of what it was trained on"
        )
    lengths = text.config.max_position_embeddings, pipe.tokenizer.model_max_length
    for what, (first, second) in (("values", widths), ("tokens", lengths)):
        if first != second:
            raise ExportError(f"the judge's parts don't fit: {first} and {second} {what}; train them as one")
    return projected_text_encoder(TEXT, text), _image_encoder(image)


def has_judge(pipe: Any) -> bool:
    """Whether the source came with a judge."""
    return all(getattr(pipe, name, None) is not None for name in COMPONENTS)


def judge_samples(pipe: Any, ids: Sequence[Feeds], images: Sequence[AnyArray]) -> dict[str, Sequence[Feeds]]:
    """Inputs of both from token ids and from pictures, [batch, 3, height, width] in [-1, 1]."""
    if not has_judge(pipe):
        return {}
    side = getattr(pipe, IMAGE).config.image_size
    small = [resize(batch.clip(-1, 1).transpose(0, 2, 3, 1), side, side) for batch in images]
    seen = [{"pixel_values": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))} for batch in small]
    return {TEXT: ids, IMAGE: seen}


def _image_encoder(model: Any) -> ComponentSpec:
    """`pixel_values`, [batch, 3, side, side], to `image_embeds` and to the pooled `features` before them."""

    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = model.resnet(pixels).pooler_output.flatten(1)
        return model.classifier(features), features

    def reference(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(pixels).logits, model.resnet(pixels).pooler_output.flatten(1)

    outputs, rows, side = ("image_embeds", "features"), {0: "batch"}, model.config.image_size
    return ComponentSpec(
        name=IMAGE,
        module=Call(model, run),
        reference=reference,
        inputs=("pixel_values",),
        outputs=outputs,
        axes={name: rows for name in ("pixel_values", *outputs)},
        example=(torch.zeros(2, 3, side, side),),
        config=config_of(model),
    )
