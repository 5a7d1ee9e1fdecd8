"""`Pipeline`: a loaded bundle that generates, and the only denoising loop.

Limits: one image size per call; guidance is classifier-free only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from pocketdiffusion import bands, sizes, vae
from pocketdiffusion.backends import parse_precisions
from pocketdiffusion.backends.base import SessionOptions, Weights
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.component import Component, Residency
from pocketdiffusion.components import describe_choices, open_components
from pocketdiffusion.denoising import answer, forecasting, run_levels, with_preset
from pocketdiffusion.errors import BundleUnsupported, InvalidRequest, NonFinite
from pocketdiffusion.families import Conditioning, load_family
from pocketdiffusion.families.guidance import takes_scale
from pocketdiffusion.generation import Generation, Run
from pocketdiffusion.image import to_pil, to_uint8
from pocketdiffusion.judge import Judge
from pocketdiffusion.noise import stacked
from pocketdiffusion.request import Request, make_request, resolve
from pocketdiffusion.result import DIGITAL_SOURCE, ComponentUse, Result, describe
from pocketdiffusion.safety import COMPONENT, SafetyChecker
from pocketdiffusion.sampling.denoise import denoiser
from pocketdiffusion.sampling.scheduler import sampling_plan
from pocketdiffusion.sampling.types import Noise, Step
from pocketdiffusion.tasks import NEEDS, TASKS, Given, check_mask, pasted, possible
from pocketdiffusion.tensors import Array
from pocketdiffusion.tiles import Size, count
from pocketdiffusion.timing import timed
from pocketdiffusion.tuning.budget import Budget, limit_bytes
from pocketdiffusion.tuning.shapes import graph_shapes
from pocketdiffusion.tuning.tune import tuned_choices

Prompts = str | Sequence[str]
StepCallback = Callable[["Pipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]


class Pipeline:
    """A model ready to generate. Graphs are opened on first use."""

    def __init__(self, bundle: Bundle, components: Mapping[str, Component]) -> None:
        self.bundle = bundle
        self.components = components
        self.scheduler_config: Mapping[str, Any] = bundle.read_json("scheduler/scheduler_config.json")
        """Diffusers' scheduler configuration; assign another to change sampler, schedule or parameterization."""
        self.notes: tuple[str, ...] = ()
        """Which device runs what, and why."""
        self.safety_checker = SafetyChecker.of(bundle, components)
        """Of bundles that hold one: blacks out pictures that it takes for unsafe. Assign None to switch it off."""
        self.judge = Judge.of(bundle, components)
        """Of bundles that hold one: scores pictures and prompts, for `best`."""
        self.vae_tile: int | None = None
        """The VAE computes no more than this many pixels squared at a time; None is no limit. See `from_pretrained`."""
        self.vae_bands: int | None = None
        """The VAE's decoder computes this many rows at a time; None is all of them. See `from_pretrained`."""
        self._family = load_family(bundle)
        self.budget = Budget(bundle, components, self._family.denoiser)
        """Keeps the memory limit, `budget.limit`; None is none. See `from_pretrained`."""
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | Mapping[str, str] = "auto",
        threads: int | None = None,
        precision: str | Mapping[str, str] | None = None,
        weights: Weights | None = None,
        size: tuple[int, int] | None = None,
        cache: bool = True,
        residency: Residency = "keep",
        variant: str | None = None,
        safety_checker: Literal["bundle"] | None = "bundle",
        vae_tile: int | None = None,
        memory_limit: int | str | None = None,
        vae_bands: int | None = None,
    ) -> Pipeline:
        """Open a bundle, or another exporter's folder of graphs, by name, path or "owner/name" in the hub's cache.

        `device` is "auto", "cpu", "openvino:gpu" …, or one for each of text_encoder, denoiser and vae; `precision`, the
        arithmetic, likewise: "bfloat16", "denoiser=bfloat16,vae=float32". "auto" takes what `pocketdiffusion tune`
        found for pictures of `size`, (width, height), by default the model's, and else the first of a fixed order.
        `precision` is by default what goes with that, else "float32", and so is `weights`, else "fast"; "compact" holds
        the int8 or float16 weights of graphs that compute in float32 as they are stored: less memory, somewhat slower
        runs. `cache` False neither uses nor fills the folder of compiled graphs. `residency`
        "keep" leaves graphs open between calls; "release" closes each when its stage is over, so that the peak is the
        largest stage and not their sum; "stream" also holds only a part of the denoiser, and of what else the bundle
        has in parts, in memory at a time, and opens each part in each step. `variant` chooses among another exporter's
        graphs: "fp16" takes
        ``model_fp16.onnx``. `safety_checker` None switches the bundle's own off, as in Diffusers. `vae_tile` bounds the
        VAE's memory: larger pictures than that many pixels squared are decoded and encoded in overlapping tiles of no
        more, which are blended. They differ a little from pictures made in one piece; without it, tiles are used only
        where the VAE's graphs are fixed to less than the picture. `vae_bands`, a number of rows, decodes in bands that
        give the same picture as one piece does, if the bundle was exported for it; `vae_tile` then bounds encoding
        only. `memory_limit`, "1GB" or bytes, is kept by this whole process: each request then gets the fastest plan
        that fits, of residency, weights (unless given), guidance in turn, VAE bands and tiles, from what each graph was
        measured to take; what is not known yet is measured in child processes first. See `Generation.memory_plan`.
        Raises BundleError, BackendError and InvalidRequest.
        """
        if safety_checker not in ("bundle", None):
            raise InvalidRequest(
                "safety_checker", f"safety_checker is {safety_checker!r}; give 'bundle', or None for none"
            )
        bundle = Bundle.open(find_bundle(model), variant=variant)
        precisions = None if precision is None else parse_precisions(precision)
        choices = tuned_choices(bundle, device, size=size, threads=threads, precisions=precisions, weights=weights)
        options = SessionOptions(threads=threads, weights=weights or "fast")
        pipe = cls(bundle, open_components(bundle, choices, options, residency, cache=cache, precisions=precisions))
        pipe.notes = (*bundle.notes, *describe_choices(choices))
        pipe.vae_tile, pipe.vae_bands = vae_tile, vae_bands
        pipe.budget.limit, pipe.budget.keep_weights = limit_bytes(memory_limit), weights is not None
        if safety_checker is None:
            pipe.safety_checker = None
        return pipe

    @overload
    def __call__(self, prompt: Prompts, *, return_dict: Literal[True] = True, **fields: Any) -> Result: ...

    @overload
    def __call__(
        self, prompt: Prompts, *, return_dict: Literal[False], **fields: Any
    ) -> tuple[Any, list[bool] | None]: ...

    def __call__(
        self,
        prompt: Prompts,
        *,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **fields: Any,
    ) -> Result | tuple[Any, list[bool] | None]:
        """Generate, with Diffusers' parameter names: see `Request` for the fields.

        `callback_on_step_end(pipe, step, timestep, {"latents": …})` may return a dict with other latents; setting
        ``pipe._interrupt = True`` in it ends sampling after that step, and what is there is decoded.
        """
        self._interrupt = False
        generation = self.stream(prompt, **fields)
        for step in generation:
            if callback_on_step_end is not None:
                self._after_step(generation, step, callback_on_step_end)
            if self._interrupt:
                generation.finish_early()
        result = generation.result
        return result if return_dict else (result.images, result.nsfw_content_detected)

    def stream(self, prompt: Prompts | Request, **fields: Any) -> Generation:
        """The generation as an iterator over its steps; closing it cancels. Raises InvalidRequest at once.

        `prompt` may be a whole `Request`, which then holds every field.
        """
        if isinstance(prompt, Request) and fields:
            given = ", ".join(fields)
            raise InvalidRequest(
                given, f"{given} was given beside a Request; put it in: dataclasses.replace(request, …)"
            )
        request = prompt if isinstance(prompt, Request) else make_request(prompt, **fields)
        request = resolve(request, self.bundle.manifest.numbers, self.bundle.manifest.tasks)
        request = replace(
            request,
            vae_tile=self.vae_tile if request.vae_tile is None else request.vae_tile,
            vae_bands=self.vae_bands if request.vae_bands is None else request.vae_bands,
        )
        request = vae.with_decoder(request, self.bundle.manifest.name, self.components)
        self._check(request)
        options = {} if request.eta is None else {"eta": request.eta}
        plan = sampling_plan(self.scheduler_config, sampler=request.sampler, schedule=request.schedule, options=options)
        plan = replace(plan, schedule=self._family.schedules.get(plan.schedule, plan.schedule))
        request = with_preset(request, plan, guided=request.guided and not takes_scale(self._denoiser))
        levels = run_levels(plan, request)
        if self.budget.limit is not None:
            self._family.prepare()  # so that a plan counts it with what the process has
        request, memory = self.budget.fit(request, self._needed(request))
        run = Run(request, plan, levels, plan.parameterization(levels), self.bundle.manifest.numbers, memory=memory)
        return Generation(run, self._generate(run))

    def close(self) -> None:
        """Free every graph."""
        for component in self.components.values():
            component.close_all()

    def _after_step(self, generation: Generation, step: Step, callback: StepCallback) -> None:
        latents = generation.latents(step)
        given = {"latents": latents.copy()}
        answer = callback(self, step.index, generation.timestep(step), given) or {}
        changed = answer.get("latents", given["latents"])
        if not np.array_equal(changed, latents):  # to convert what is unchanged would only round it
            generation.replace_latents(step, changed)

    def _generate(self, run: Run) -> Generator[Step, None, Result]:
        request, timings = run.request, run.timings
        parts = {name: self._part(name, request) for name in self._needed(request)}
        for name, part in parts.items():
            if name != self._family.denoiser or not part.fixes:  # its shapes are known when the prompts are read
                self._open_ahead(part, run)
        with timings.span("tokenise"):
            split = self._family.split(request, self.components)
        self._open_ahead(parts[self._family.denoiser], run, split.chunks)
        with timings.span("text_encode"):
            conditioning = self._family.condition(request, split, self.components, timings)
        noise = stacked(request.noise_sources(), sizes.latent_shape(request, self.bundle.manifest.numbers))
        latents = yield from self._denoise(run, conditioning, noise)
        images: Array | None = None
        flags: list[bool] | None = None
        scores: Array | None = None
        if request.output_type != "latent":
            images = pasted(self._decode(run, latents), request)
            if self.safety_checker is not None:
                flags = self.safety_checker.black_out(images, timings)
            if self.judge is not None and request.best is not None:
                scores = self.judge.scores(images, request, timings)
        result = replace(
            self._result(run, latents, images),
            messages=(
                *conditioning.messages,
                *run.messages,
                *self._vae_messages(request),
                *self._safety_messages(flags),
                *([] if run.memory is None else [self.budget.report(run.memory)]),
            ),
            nsfw_content_detected=flags,
        )
        if scores is None or request.best is None:
            return result
        return result.best(scores.tolist(), len(request.prompt), request.best)

    def _denoise(self, run: Run, conditioning: Conditioning, noise: Noise) -> Generator[Step, None, Array]:
        """The denoising loop. Returns the final latents."""
        request = run.request
        given = Given(
            request,
            run.levels,
            run.parameterization,
            noise,
            self._encode(run),
            run.numbers,
            self._extra_channels,
        )
        start = TASKS[request.task](given)
        if start.channels is not None:
            conditioning = conditioning.with_channels(start.channels, guiding=request.task == "instruct")
        index = 0
        with self._part(self._family.denoiser, request).use() as component:
            component.wait(run.timings)  # opened ahead in a thread; that is no part of the first step
            denoise = denoiser(answer(component, run, conditioning), run.parameterization)
            forecast = forecasting(denoise, run, start.levels)
            steps = run.plan.run(start.wrap(forecast or denoise), start.x, start.levels, noise)
            try:
                for step in timed(steps, run.timings, "step"):
                    yield step
                    index = step.index + 1
                    if run.finish_early:
                        break
            except NonFinite as error:
                raise error.at_step(index) from None
        if forecast is not None:
            total = forecast.ran + forecast.skipped
            run.messages.append(f"{forecast.skipped} of the denoiser's {total} answers were forecast, not computed")
        return start.finish(run.parameterization.latent(step.x, step.sigma_next))

    def _decode(self, run: Run, latents: Array) -> Array:
        if run.request.vae_bands is not None:
            with run.timings.span("vae_decode"):
                decoder = self.components["vae_decoder"]
                return vae.decode(decoder, latents, run.numbers, run.timings, bands=run.request.vae_bands)
        name = vae.decoder_of(run.request)
        with self._part(name, run.request).use() as decoder:
            decoder.wait(run.timings)
            with run.timings.span("vae_decode"):
                return vae.decode(decoder, latents, run.numbers, run.timings, self._tile(name, run.request))

    def _encode(self, run: Run) -> Callable[[Array, Noise], Array]:
        def encode(images: Array, noise: Noise) -> Array:
            with self._part("vae_encoder", run.request).use() as encoder:
                encoder.wait(run.timings)
                with run.timings.span("vae_encode"):
                    tile = self._tile("vae_encoder", run.request)
                    return vae.encode(encoder, images, run.numbers, noise, run.timings, tile)

        return encode

    def _part(self, name: str, request: Request) -> Component:
        """A component, of its graphs the one for the picture's size, or for a tile of it, or the first for bands."""
        if name == "vae_decoder" and request.vae_bands is not None:
            return self.components[name].bands[0]
        factor = self.bundle.manifest.numbers.vae_factor
        height, width = self._tile(name, request)
        return self.components[name].at(width * factor, height * factor)

    def _tile(self, name: str, request: Request) -> Size:
        """What a component computes at a time, in latent cells: the whole picture, or a tile of it."""
        height, width = sizes.latent_shape(request, self.bundle.manifest.numbers)[2:]
        if name not in vae.COMPONENTS or (name == "vae_decoder" and request.vae_bands is not None):
            return height, width
        return vae.tile_for(self.components[name], (height, width), self.bundle.manifest.numbers, request.vae_tile)

    def _open_ahead(self, part: Component, run: Run, texts: int = 1) -> None:
        """Tell a component what it will be fed, of `texts` text lengths, and open it in a thread."""
        numbers, cells = self.bundle.manifest.numbers, self._tile(part.name, run.request)
        numbers = replace(numbers, text_length=numbers.text_length * texts)
        with suppress(BundleUnsupported):  # a graph whose axes are not all known is opened for any shapes
            part.expect(graph_shapes(part.name, part.entry, numbers, cells, rows=1))
        if run.memory is None:  # what is opened together takes memory together
            part.open_ahead()

    def _needed(self, request: Request) -> list[str]:
        """Components in the order of use."""
        texts = [name for name in self.components if name.startswith("text_encoder")]
        first = [*texts, self._family.denoiser]
        encoder = ["vae_encoder"] if request.image is not None else []
        decoder = [vae.decoder_of(request)] if request.output_type != "latent" else []
        checker = [self.safety_checker.component.name] if decoder and self.safety_checker is not None else []
        judge = [part.name for part in (self.judge.text, self.judge.image)] if self.judge and request.best else []
        return first + encoder + decoder + checker + judge

    @property
    def _denoiser(self) -> Component:
        return self.components[self._family.denoiser]

    @property
    def _extra_channels(self) -> int:
        """Input channels of the denoiser that are not the latents'."""
        channels = self.bundle.manifest.components[self._family.denoiser].inputs["sample"].shape[1]
        latent = self.bundle.manifest.numbers.latent_channels
        return channels - latent if isinstance(channels, int) else 0

    def _check(self, request: Request) -> None:
        """What only the bundle knows: tasks, components, sizes."""
        manifest = self.bundle.manifest
        tasks = possible(manifest, self._extra_channels)
        if request.task not in tasks:
            known = ", ".join(f"{task} (give {NEEDS[task]})" if task in NEEDS else task for task in tasks)
            raise BundleUnsupported(f"{manifest.name} can't do {request.task}; it was exported for {known}")
        if request.best is not None and self.judge is None:
            raise BundleUnsupported(
                f"best={request.best} was asked; {manifest.name} has no judge to choose by: leave best out, or export "
                "the model with judge_text and judge_image (see models/README.md)"
            )
        sizes.check(request, manifest, self._family.denoiser)
        check_mask(request, manifest.numbers)
        if request.vae_bands is not None and request.output_type != "latent":
            bands.check(self.components["vae_decoder"], request.vae_bands)
        for name in self._needed(request):
            self._tile(name, request)

    def _result(self, run: Run, latents: Array, images: Array | None) -> Result:
        request, backend = run.request, self.components[self._family.denoiser]
        pixels = None if images is None else to_uint8(images)
        chosen: Any = latents
        if images is not None and pixels is not None:
            chosen = to_pil(pixels) if request.output_type == "pil" else np.clip(images / 2 + 0.5, 0, 1)
        return Result(
            images=chosen,
            seeds=request.seeds,
            timings=run.timings,
            configuration={name: ComponentUse.of(self._part(name, request)) for name in self._needed(request)},
            parameters=describe(request, run.plan, len(run.levels.timesteps), self.bundle, backend.device),
            digital_source=DIGITAL_SOURCE[request.task],
            pixels=pixels,
            latents=latents,
        )

    def _vae_messages(self, request: Request) -> list[str]:
        height, width = sizes.latent_shape(request, self.bundle.manifest.numbers)[2:]
        parts = [name for name in self._needed(request) if name in vae.COMPONENTS]
        tiles = {name: self._tile(name, request) for name in parts}
        factor = self.bundle.manifest.numbers.vae_factor
        told = [
            f"{name} ran in {count((height, width), tile)} tiles of {sizes.pixels(tile, factor)} pixels; "
            "in one piece it gives a slightly different picture"
            for name, tile in tiles.items()
            if tile != (height, width)
        ]
        if vae.TINY in parts:
            told.append("the tiny decoder drew the pictures; the full one (--decoder full) draws finer detail")
        return told

    def _safety_messages(self, flags: list[bool] | None) -> list[str]:
        if COMPONENT in self.components and self.safety_checker is None:
            return ["the model's safety checker is switched off; the pictures were not checked"]
        return [
            f"image {index} is black: the safety checker takes it for unsafe; try another prompt or seed"
            for index, flag in enumerate(flags or (), 1)
            if flag
        ]
