"""Runner of the peer "optimum-onnx". Settings: "model" (folder of ONNX graphs), "scheduler", "graphs", "recipe"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.diffusers_api import Drawing
    from pocketdiffusion_bench.peers.runners.protocol import finish, start
else:
    from diffusers_api import Drawing
    from protocol import finish, start

PROVIDER = "CPUExecutionProvider"


def main() -> None:
    """Make the pictures."""
    job = start()
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTDiffusionPipeline
    from optimum.version import __version__

    job.events.enter("load")
    options = onnxruntime.SessionOptions()
    if job.case["threads"] is not None:
        torch.set_num_threads(job.case["threads"])
        options.intra_op_num_threads = job.case["threads"]
    pipe = ORTDiffusionPipeline.from_pretrained(job.settings["model"], provider=PROVIDER, session_options=options)
    drawing = Drawing(job, pipe, torch.float32)
    image = job.draw(drawing.picture)
    session = pipe.unet.session
    kinds = sorted({entry.type for entry in [*session.get_inputs(), *session.get_outputs()] if "float" in entry.type})
    engine = {
        "engine": "onnxruntime",
        "version": onnxruntime.__version__,
        "optimum": __version__,
        "device": "onnxruntime:cpu" if session.get_providers() == [PROVIDER] else str(session.get_providers()),
        "precision": {"tensor(float)": "float32", "tensor(float16)": "float16"}.get("+".join(kinds), "+".join(kinds)),
        "threads": session.get_session_options().intra_op_num_threads or None,
        "recipe": job.settings["recipe"],
        "graphs": job.settings["graphs"],
    }
    finish(job, {**engine, **drawing.used(image)})


if __name__ == "__main__":
    main()
