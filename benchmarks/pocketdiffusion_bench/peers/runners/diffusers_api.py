"""Pictures by a pipeline with Diffusers' interface, with its stages timed. Shared by three runners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time this folder is the script's own and on the path
    from pocketdiffusion_bench.peers.runners.protocol import Job
else:
    from protocol import Job


class Drawing:
    """Makes the pictures of a job and counts what was done. `precision` is the torch dtype of the first latent."""

    def __init__(self, job: Job, pipe: Any, precision: Any) -> None:
        import torch

        self._job, self._pipe = job, pipe
        self._evaluations = 0
        if name := job.settings.get("scheduler"):
            import diffusers

            pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        case, factor = job.case, pipe.vae_scale_factor
        shape = (1, pipe.unet.config.in_channels, case["height"] // factor, case["width"] // factor)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(case["seed"]))
        self._noise = noise.to(precision)  # torch draws other numbers when it draws in bfloat16
        self._encode = pipe.encode_prompt
        pipe.encode_prompt = self._encode_prompt

    def picture(self) -> Any:
        """One PIL image. The stages are text_encode, one step each, and vae_decode with the way to 8 bits."""
        case, self._evaluations = self._job.case, 0
        self._job.events.enter("text_encode")
        return self._pipe(
            case["prompt"],
            width=case["width"],
            height=case["height"],
            num_inference_steps=case["steps"],
            guidance_scale=case["guidance"],
            latents=self._noise.clone(),
            callback_on_step_end=self._step_done,
        ).images[0]

    def used(self, image: Any) -> dict[str, Any]:
        """The part of the configuration that Diffusers' interface tells. The size is the picture's own."""
        width, height = image.size
        return {
            "width": width,
            "height": height,
            "steps": self._pipe.scheduler.num_inference_steps,
            "evaluations": self._evaluations,
            "guidance": self._pipe.guidance_scale,
            "sampler": type(self._pipe.scheduler).__name__,
            "noise": "torch-cpu",
        }

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        found = self._encode(*args, **kwargs)
        self._job.events.enter("step")
        return found

    def _step_done(self, pipe: Any, index: int, timestep: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
        self._evaluations += 1
        last = self._evaluations == len(pipe.scheduler.timesteps)
        self._job.events.enter("vae_decode" if last else "step")
        return values
