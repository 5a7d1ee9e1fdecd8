"""Runner of the peers "diffusers" and "diffusers-best".

Settings: "model" (Diffusers folder), "optimized" (channels_last and torch.compile of the UNet and the VAE decoder).
The case's precision is the torch dtype of all parts. Limit: the CPU only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketdiffusion_bench.peers.runners.diffusers_api import Drawing
    from pocketdiffusion_bench.peers.runners.protocol import finish, start
else:
    from diffusers_api import Drawing
    from protocol import finish, start


def main() -> None:
    """Make the pictures."""
    job = start()
    import diffusers
    import torch

    job.events.enter("load")
    if job.case["threads"] is not None:
        torch.set_num_threads(job.case["threads"])
    precision = getattr(torch, job.settings["precision"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        job.settings["model"], torch_dtype=precision, local_files_only=True
    )
    optimized = bool(job.settings["optimized"])
    if optimized:
        _optimize(torch, pipe)
    drawing = Drawing(job, pipe, precision)
    image = job.draw(drawing.picture)
    engine = {
        "engine": "diffusers",
        "version": diffusers.__version__,
        "torch": torch.__version__,
        "device": pipe.device.type,
        "precision": _precision(pipe),
        "threads": torch.get_num_threads(),
        "recipe": "fp32",
        "graphs": "torch.compile, channels_last" if optimized else "torch eager",
    }
    finish(job, {**engine, **_compiled(torch, optimized), **drawing.used(image)})


def _optimize(torch: Any, pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet)
    pipe.vae.decode = torch.compile(pipe.vae.decode)


def _precision(pipe: Any) -> str:
    """The dtype of the weights of all parts; several joined by "+", so that a mix equals none."""
    parts = (pipe.text_encoder, pipe.unet, pipe.vae)
    return "+".join(
        sorted({str(tensor.dtype).removeprefix("torch.") for part in parts for tensor in part.parameters()})
    )


def _compiled(torch: Any, optimized: bool) -> dict[str, Any]:
    """What torch.compile did, so that a graph that fell back to eager shows, and compiled code from an earlier run."""
    if not optimized:
        return {}
    counters = torch._dynamo.utils.counters
    return {
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "compile_cache_hits": counters["inductor"]["fxgraph_cache_hit"],
    }


if __name__ == "__main__":
    main()
