"""Runner of the peer "optimum-intel".

Settings: "model" (folder of OpenVINO graphs), "precision", "scheduler", "graphs", "recipe". Graphs take any image size,
as they do by default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.diffusers_api import Drawing
    from pocketdiffusion_bench.peers.runners.protocol import finish, start
else:
    from diffusers_api import Drawing
    from protocol import finish, start

NAMES = {"float32": "f32", "bfloat16": "bf16"}
"""Torch's names -> OpenVINO's."""


def main() -> None:
    """Make the pictures."""
    job = start()
    import openvino
    import torch
    from optimum.intel import OVDiffusionPipeline
    from optimum.intel.version import __version__

    job.events.enter("load")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": NAMES[job.settings["precision"]]}
    if job.case["threads"] is not None:
        torch.set_num_threads(job.case["threads"])
        options["INFERENCE_NUM_THREADS"] = str(job.case["threads"])
    pipe = OVDiffusionPipeline.from_pretrained(job.settings["model"], device="CPU", ov_config=options)
    drawing = Drawing(job, pipe, torch.float32)
    image = job.draw(drawing.picture)
    compiled = {part: getattr(pipe, part).request for part in ("text_encoder", "unet", "vae_decoder")}
    found = {part: model.get_property("INFERENCE_PRECISION_HINT").to_string() for part, model in compiled.items()}
    names = {short: name for name, short in NAMES.items()}
    engine = {
        "engine": "openvino",
        "version": openvino.__version__,
        "optimum-intel": __version__,
        "device": "openvino:" + ",".join(compiled["unet"].get_property("EXECUTION_DEVICES")).lower(),
        "precision": "+".join(sorted({names.get(short, short) for short in found.values()})),
        "threads": compiled["unet"].get_property("INFERENCE_NUM_THREADS"),
        "recipe": job.settings["recipe"],
        "graphs": job.settings["graphs"],
    }
    finish(job, {**engine, **drawing.used(image)})


if __name__ == "__main__":
    main()
