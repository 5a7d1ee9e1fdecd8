"""Runner of the peer "optimum-intel".

Settings: "model" (folder of OpenVINO graphs), "precision", "scheduler", "graphs", "recipe". Graphs take any image size,
as they do by default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.diffusers_api import Drawing
    from pocketdiffusion_bench.peers.runners.openvino_options import options, precision
    from pocketdiffusion_bench.peers.runners.protocol import finish, start
else:
    from diffusers_api import Drawing
    from openvino_options import options, precision
    from protocol import finish, start


def main() -> None:
    """Make the pictures."""
    job = start()
    import openvino
    import torch
    from optimum.intel import OVDiffusionPipeline
    from optimum.intel.version import __version__

    job.events.enter("load")
    if job.case["threads"] is not None:
        torch.set_num_threads(job.case["threads"])
    properties = {name: str(value) for name, value in options(job).items()}
    pipe = OVDiffusionPipeline.from_pretrained(job.settings["model"], device="CPU", ov_config=properties)
    drawing = Drawing(job, pipe, torch.float32)
    image = job.draw(drawing.picture)
    compiled = {part: getattr(pipe, part).request for part in ("text_encoder", "unet", "vae_decoder")}
    engine = {
        "engine": "openvino",
        "version": openvino.__version__,
        "optimum-intel": __version__,
        "device": "openvino:" + ",".join(compiled["unet"].get_property("EXECUTION_DEVICES")).lower(),
        "precision": "+".join(sorted({precision(model) for model in compiled.values()})),
        "threads": compiled["unet"].get_property("INFERENCE_NUM_THREADS"),
        "recipe": job.settings["recipe"],
        "graphs": job.settings["graphs"],
    }
    finish(job, {**engine, **drawing.used(image)})


if __name__ == "__main__":
    main()
