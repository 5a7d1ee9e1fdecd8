"""Runner of the peer "openvino-genai".

Settings: "model" (folder of OpenVINO graphs with tokenizers), "precision", "scheduler", "graphs", "recipe". The
pipeline tells when a step ends and how long the text encoder ran; from that the stages are made when a picture is done.
It does not give its compiled graphs away: precision and threads are a tiny graph's, compiled with the same options.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.openvino_options import options, precision
    from pocketdiffusion_bench.peers.runners.protocol import Job, finish, normal, start
else:
    from openvino_options import options, precision
    from protocol import Job, finish, normal, start


def main() -> None:
    """Make the pictures."""
    job = start()
    import openvino
    import openvino_genai as genai
    from PIL import Image

    job.events.enter("load")
    pipe = genai.Text2ImagePipeline(job.settings["model"], "CPU", **options(job))
    config = Path(job.settings["model"]) / "scheduler" / "scheduler_config.json"
    if kind := job.settings["scheduler"]:
        pipe.set_scheduler(genai.Scheduler.from_config(config, getattr(genai.Scheduler.Type, kind)))
    ends: list[float] = []
    noise = _generator(openvino, genai, job.case["seed"])
    image = job.draw(lambda: Image.fromarray(_pixels(job, pipe, noise, ends)))
    width, height = image.size
    used = {
        "engine": "openvino",
        "version": openvino.__version__,
        "openvino-genai": genai.__version__,
        "device": "openvino:cpu",
        **_effective(openvino, job),
        "recipe": job.settings["recipe"],
        "graphs": job.settings["graphs"],
        "width": width,
        "height": height,
        "evaluations": len(ends),
        "steps": job.case["steps"],
        "guidance": job.case["guidance"],
        "sampler": kind or json.loads(config.read_text(encoding="utf-8"))["_class_name"],
        "noise": "torch-cpu",
    }
    finish(job, used)


def _pixels(job: Job, pipe: Any, noise: Any, ends: list[float]) -> Any:
    case = job.case
    ends.clear()

    def step_done(index: int, count: int, latent: Any) -> bool:
        ends.append(time.perf_counter())
        return False

    job.events.leave()
    start = time.perf_counter()
    job.events.write("begin", name="step", at=start)
    found = pipe.generate(
        case["prompt"],
        width=case["width"],
        height=case["height"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        generator=noise,
        callback=step_done,
    )
    text = sum(pipe.get_performance_metrics().get_text_encoder_infer_duration().values()) / 1000
    marks = [start + text, *ends]
    job.events.span("text_encode", start, marks[0])
    for begin, end in zip(marks, ends, strict=False):
        job.events.span("step", begin, end)
    job.events.enter("vae_decode", ends[-1])
    return found.data[0]


def _effective(openvino: Any, job: Job) -> dict[str, Any]:
    """What this machine's engine makes of the job's options."""
    value = openvino.opset13.parameter([1], openvino.Type.f32)
    graph = openvino.Model([openvino.opset13.relu(value)], [value])
    compiled = openvino.Core().compile_model(graph, "CPU", options(job))
    return {"precision": precision(compiled), "threads": compiled.get_property("INFERENCE_NUM_THREADS")}


def _generator(openvino: Any, genai: Any, seed: int) -> Any:
    """A source of noise with the numbers of torch's CPU generator, for the one draw that a picture takes."""

    class TorchNoise(genai.Generator):  # type: ignore[misc]
        def next(self) -> float:
            raise NotImplementedError("noise is drawn as a tensor")

        def randn_tensor(self, shape: Any) -> Any:
            size = [int(side) for side in shape]
            count = 1
            for side in size:
                count *= side
            return openvino.Tensor(normal(seed, count).reshape(size))

        def seed(self, new_seed: int) -> None:
            raise NotImplementedError("the seed is fixed")

    return TorchNoise()


if __name__ == "__main__":
    main()
