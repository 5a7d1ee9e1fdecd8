"""SD 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, an AutoencoderKL.

Limits: UNets with 4 latent channels in, without class, added or guidance embeddings; text encoders that take no
attention mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pocketdiffusion.bundle.manifest import Numbers
from pocketdiffusion.tensors import AnyArray
from pocketdiffusion_export.component import Call, ComponentSpec, Feeds
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.families.base import Samples
from pocketdiffusion_export.forms import attend, plain_attention
from pocketdiffusion_export.plan import ExportPlan, GoldenPlan

MAX_CLIP_SKIP = 4


def clip_skips(model: Any) -> range:
    """Numbers of last layers that the text encoder can leave out: 1 to 4, or fewer in a shallow one."""
    return range(1, min(MAX_CLIP_SKIP, model.config.num_hidden_layers - 1) + 1)


class StableDiffusion:
    """The family; see `base.Family`."""

    name = "sd"
    tasks: tuple[str, ...] = ("text-to-image", "image-to-image")

    def components(self, pipe: Any) -> tuple[ComponentSpec, ...]:
        """text_encoder, unet, vae_decoder and vae_encoder, with optimum's names of inputs and outputs."""
        _check_unet(pipe.unet.config)
        return _text_encoder(pipe.text_encoder), _unet(pipe), _vae_decoder(pipe.vae), _vae_encoder(pipe.vae)

    def samples(self, pipe: Any, prompts: Sequence[str], plan: ExportPlan) -> Samples:
        """Generate every prompt with Diffusers and keep what went into each component.

        The last sample of each has another batch, size and length, so that axes fixed by tracing are found.
        """
        unet: list[Feeds] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (args[0], args[1].float(), kwargs["encoder_hidden_states"])
            names = ("sample", "timestep", "encoder_hidden_states")
            unet.append({name: value.numpy().copy() for name, value in zip(names, values, strict=True)})

        numbers = _numbers(pipe, plan)
        decoder: list[Feeds] = []
        hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for seed, prompt in enumerate(prompts):
                golden = GoldenPlan(prompt, seed)
                latents = _generate(pipe, golden, numbers, "latent") / numbers.latent_scale + numbers.latent_shift
                decoder.append({"latent_sample": latents.numpy()})
        finally:
            hook.remove()
        decoder.append({"latent_sample": _other_shape(decoder[-1]["latent_sample"])})
        last = unet[-1]
        context = last["encoder_hidden_states"]
        unet.append(
            last
            | {"sample": _other_shape(last["sample"])}
            | {"encoder_hidden_states": np.tile(np.concatenate([context, context], 1)[:1], (3, 1, 1))}
        )
        with torch.inference_mode():
            images = [pipe.vae.decode(torch.from_numpy(feeds["latent_sample"])).sample.numpy() for feeds in decoder]
        ids = [_ids(pipe, prompt) for prompt in ("", *prompts)]
        return {
            "text_encoder": [*({"input_ids": one} for one in ids), {"input_ids": np.concatenate(ids[:3])}],
            "unet": unet,
            "vae_decoder": decoder,
            "vae_encoder": [{"sample": image.clip(-1, 1)} for image in images],
        }

    def numbers(self, pipe: Any, samples: Samples, plan: ExportPlan) -> Numbers:
        """From the source's configs and the plan; the preview's colours are fitted to the decoder."""
        pairs = zip(samples["vae_decoder"], samples["vae_encoder"], strict=True)
        bare = _numbers(pipe, plan)
        return _numbers(pipe, plan, _fit_rgb([(d["latent_sample"], e["sample"]) for d, e in pairs], bare))

    def reference_image(self, pipe: Any, golden: GoldenPlan, numbers: Numbers) -> AnyArray:
        """The golden image from Diffusers."""
        return _to_uint8(_generate(pipe, golden, numbers, "np")[0])


FAMILY = StableDiffusion()


def _generate(pipe: Any, golden: GoldenPlan, numbers: Numbers, output: str) -> Any:
    steps, guidance = _settings(golden, numbers)
    generator = torch.Generator("cpu").manual_seed(golden.seed)
    return pipe(
        golden.prompt,
        width=numbers.width,
        height=numbers.height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type=output,
    ).images


def _other_shape(images: AnyArray) -> AnyArray:
    """Three images of half the width for one or two."""
    return np.concatenate([images[:1, :, :, : images.shape[3] // 2]] * 3)


def _settings(golden: GoldenPlan, numbers: Numbers) -> tuple[int, float]:
    steps = numbers.default_steps if golden.steps is None else golden.steps
    return steps, numbers.default_guidance if golden.guidance is None else golden.guidance


def _to_uint8(image: AnyArray) -> AnyArray:
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)


def _ids(pipe: Any, text: str) -> AnyArray:
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
    return np.array([ids], np.int64)


def _numbers(pipe: Any, plan: ExportPlan, rgb: tuple[tuple[float, float, float], ...] | None = None) -> Numbers:
    vae, given = pipe.vae.config, plan.numbers
    factor = 2 ** (len(vae.block_out_channels) - 1)
    native = pipe.unet.config.sample_size * factor
    return Numbers(
        width=native if given.width is None else given.width,
        height=native if given.height is None else given.height,
        latent_channels=vae.latent_channels,
        latent_scale=vae.scaling_factor,
        latent_shift=vae.shift_factor or 0.0,
        vae_factor=factor,
        size_multiple=factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
        text_length=pipe.tokenizer.model_max_length,
        default_steps=25 if given.default_steps is None else given.default_steps,
        default_guidance=7.5 if given.default_guidance is None else float(given.default_guidance),
        latent_rgb=rgb,
    )


def _fit_rgb(pairs: Sequence[tuple[AnyArray, AnyArray]], numbers: Numbers) -> tuple[tuple[float, float, float], ...]:
    """Least squares from latent cells to the mean colour of their pixels; a last row for the offset."""
    cells, colours = [], []
    for latents, image in pairs:
        scaled = (latents - numbers.latent_shift) * numbers.latent_scale
        batch, channels, height, width = scaled.shape
        blocks = image.reshape(batch, 3, height, numbers.vae_factor, width, numbers.vae_factor).mean((3, 5))
        cells.append(scaled.transpose(0, 2, 3, 1).reshape(-1, channels))
        colours.append(blocks.transpose(0, 2, 3, 1).reshape(-1, 3))
    matrix = np.concatenate(cells).astype(np.float64)
    matrix = np.concatenate([matrix, np.ones((len(matrix), 1))], 1)
    solution = np.linalg.lstsq(matrix, np.concatenate(colours).astype(np.float64), rcond=None)[0]
    return tuple((round(r, 5), round(g, 5), round(b, 5)) for r, g, b in solution.tolist())


def _check_unet(config: Any) -> None:
    if config.in_channels != config.out_channels:
        raise ExportError(f"a UNet with {config.in_channels} input channels can't be exported yet; known: plain ones")
    for name in (
        "class_embed_type",
        "addition_embed_type",
        "time_cond_proj_dim",
        "num_class_embeds",
        "encoder_hid_dim",
    ):
        if getattr(config, name, None) is not None:
            raise ExportError(f"a UNet with '{name}' ({getattr(config, name)}) can't be exported yet")


def _config(model: Any) -> dict[str, Any]:
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return {key: value for key, value in sorted(config.items()) if key != "_name_or_path"}


def _text_encoder(model: Any) -> ComponentSpec:
    skips = clip_skips(model)
    outputs = ("last_hidden_state", "pooler_output", *(f"clip_skip_{skip}" for skip in skips))

    def reference(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = model(ids, output_hidden_states=True)
        norm = model.text_model.final_layer_norm
        skipped = [norm(out.hidden_states[-(skip + 1)]) for skip in skips]
        return out.last_hidden_state, out.pooler_output, *skipped

    states = {0: "batch", 1: "length"}
    ids = torch.full((2, model.config.max_position_embeddings), model.config.eos_token_id, dtype=torch.int64)
    return ComponentSpec(
        name="text_encoder",
        module=Call(model, lambda ids: _encode_text(model, ids)),
        reference=reference,
        inputs=("input_ids",),
        outputs=outputs,
        axes={"input_ids": states, **{name: states for name in outputs}, "pooler_output": {0: "batch"}},
        example=(ids,),
        config=_config(model),
    )


def _encode_text(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """CLIP's text transformer in the exported form, from the source's own layers."""
    text, length = model.text_model, model.config.max_position_embeddings
    causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    mask = causal[:, :, : ids.shape[1], : ids.shape[1]]
    states = [text.embeddings(input_ids=ids)]
    for layer in text.encoder.layers:
        own, x = layer.self_attn, layer.layer_norm1(states[-1])
        attended = attend(own.q_proj(x) * own.scale, own.k_proj(x), own.v_proj(x), own.num_heads, mask)
        x = states[-1] + own.out_proj(attended)
        states.append(x + layer.mlp(layer.layer_norm2(x)))
    last = text.final_layer_norm(states[-1])
    skipped = [text.final_layer_norm(states[-(skip + 1)]) for skip in clip_skips(model)]
    return last, _pool(model.config.eos_token_id, last, ids), *skipped


def _pool(end: int, last: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The state at the first end token. Configs of old SD models say 2 by mistake: there the largest id ends."""
    found = ids if end == 2 else (ids == end)
    first = found.to(torch.int32).argmax(-1)
    pooled: torch.Tensor = last.gather(1, first[:, None, None].expand(-1, 1, last.shape[2]))[:, 0]
    return pooled


def _unet(pipe: Any) -> ComponentSpec:
    unet, size = pipe.unet, pipe.unet.config.sample_size
    image = {0: "batch", 2: "height", 3: "width"}
    context = torch.zeros(2, pipe.text_encoder.config.max_position_embeddings, unet.config.cross_attention_dim)
    return _image_model(
        "unet",
        unet,
        lambda *inputs: unet(*inputs, return_dict=False)[0],
        inputs=("sample", "timestep", "encoder_hidden_states"),
        output="out_sample",
        axes={"sample": image, "encoder_hidden_states": {0: "batch", 1: "length"}, "out_sample": image},
        example=(torch.zeros(2, unet.config.in_channels, size, size), torch.tensor(500.0), context),
    )


def _vae_decoder(vae: Any) -> ComponentSpec:
    return _image_model(
        "vae_decoder",
        vae,
        lambda latents: vae.decode(latents, return_dict=False)[0],
        inputs=("latent_sample",),
        output="sample",
        axes={
            "latent_sample": {0: "batch", 2: "height_latent", 3: "width_latent"},
            "sample": {0: "batch", 2: "height", 3: "width"},
        },
        example=(torch.zeros(2, vae.config.latent_channels, 16, 16),),
    )


def _vae_encoder(vae: Any) -> ComponentSpec:
    side = 16 * 2 ** (len(vae.config.block_out_channels) - 1)
    return _image_model(
        "vae_encoder",
        vae,
        lambda images: vae.encode(images).latent_dist.parameters,
        inputs=("sample",),
        output="latent_parameters",
        axes={
            "sample": {0: "batch", 2: "height", 3: "width"},
            "latent_parameters": {0: "batch", 2: "height_latent", 3: "width_latent"},
        },
        example=(torch.zeros(2, vae.config.in_channels, side, side),),
    )


def _image_model(
    name: str,
    model: Any,
    function: Callable[..., torch.Tensor],
    *,
    inputs: tuple[str, ...],
    output: str,
    axes: Mapping[str, Mapping[int, str]],
    example: tuple[torch.Tensor, ...],
) -> ComponentSpec:
    """A Diffusers model with one output, which runs as it is and is traced with plain attention."""
    return ComponentSpec(
        name=name,
        module=Call(model, function),
        reference=lambda *tensors: (function(*tensors),),
        inputs=inputs,
        outputs=(output,),
        axes=axes,
        example=example,
        config=_config(model),
        form=lambda: plain_attention(model),
    )
