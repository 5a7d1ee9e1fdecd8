"""Runner of the peer "stable-diffusion-cpp".

Settings: "model" (Diffusers folder), "type" (ggml's type of the weights), "sampler", "sigmas", "recipe". Stages follow
its log lines and its progress calls. Its options are the binding's defaults but for what a case names.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.protocol import Job, finish, start
else:
    from protocol import Job, finish, start

STAGES = {"get_learned_condition completed": "step", "sampling completed": "vae_decode"}
"""What a log line that holds these words is the beginning of."""


def main() -> None:
    """Make the pictures."""
    job = start()
    import stable_diffusion_cpp as binding

    job.events.enter("load")
    settings, threads = job.settings, job.case["threads"]
    model = binding.StableDiffusion(
        model_path=settings["model"],
        wtype=settings["type"],
        n_threads=threads or binding.sd_get_num_physical_cores(),
        rng_type="cpu",
        sampler_rng_type="cpu",
        vae_decode_only=True,
        verbose=False,
    )
    log = _Log(job)
    callback = binding.sd_log_callback(log.line)
    binding.sd_set_log_callback(callback, ctypes.c_void_p(0))
    image = job.draw(lambda: _picture(job, model, log))
    width, height = image.size
    used = {
        "engine": "stable-diffusion.cpp",
        "version": version("stable-diffusion-cpp-python"),
        "build": " ".join(binding.sd_get_system_info().decode().split()),
        "device": "cpu",
        "precision": f"ggml {settings['type']}",
        "threads": model.n_threads,
        "recipe": settings["recipe"],
        "width": width,
        "height": height,
        "evaluations": log.steps,
        "steps": log.steps,
        "guidance": job.case["guidance"],
        "sampler": settings["sampler"],
        "noise": "torch-cpu",
    }
    finish(job, used)


class _Log:
    """Turns what the library says into stages."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.steps = 0

    def line(self, level: int, text: bytes, data: Any) -> None:
        """One line of its log."""
        said = text.decode(errors="replace")
        for words, stage in STAGES.items():
            if words in said:
                self._job.events.enter(stage)

    def progress(self, step: int, steps: int, seconds: float) -> None:
        """Called at the beginning with 0, then after each step."""
        if step > 0:
            self.steps += 1
            if step < steps:
                self._job.events.enter("step")


def _picture(job: Job, model: Any, log: _Log) -> Any:
    case = job.case
    log.steps = 0
    job.events.enter("text_encode")
    return model.generate_image(
        prompt=case["prompt"],
        width=case["width"],
        height=case["height"],
        cfg_scale=case["guidance"],
        sample_method=job.settings["sampler"],
        sample_steps=case["steps"],
        sigmas=",".join(map(repr, job.settings["sigmas"])),
        seed=case["seed"],
        progress_callback=log.progress,
    )[0]


if __name__ == "__main__":
    main()
