"""What each training stage reads, trains and leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler

from sticker_train.denoiser import DenoiserTask, Material, new_denoiser, new_scheduler, read_denoiser
from sticker_train.distil import DistilTask
from sticker_train.judge import SIDE as JUDGED_SIDE
from sticker_train.judge import JudgeTask, load_tokenizer
from sticker_train.loop import Say, Settings, train
from sticker_train.pack import Pictures, read_pack
from sticker_train.run import Run
from sticker_train.shapes import Shape
from sticker_train.tokens import train_tokenizer
from sticker_train.vae import TinyTask, VaeTask, finished_vae

Train = Callable[[Run, Path, Shape, Settings, Say], None]


def tokenizer(run: Run, data: Path, shape: Shape, say: Say) -> None:
    """Learn the words."""
    count = train_tokenizer(_pictures(data, 8).rows, run.new("tokenizer"), shape.words, shape.text_length)
    say(f"{count} tokens")


def judge(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the judge on the run's tokens."""
    task = JudgeTask(_pictures(data, JUDGED_SIDE), _tokenizer(run), settings.seed, settings.device)
    train(task, run.stage("judge"), settings, say)
    run.save("judge_text", task.model.text)
    run.save("judge_image", task.model.image)


def vae(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the VAE and measure its latents."""
    pictures = _pictures(data, shape.side)
    task = VaeTask(pictures, shape, settings.seed, settings.device)
    train(task, run.stage("vae"), settings, say)
    run.save("vae", finished_vae(task, pictures))


def tiny(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the tiny decoder to do the VAE's work."""
    task = TinyTask(_pictures(data, shape.side), _vae(run), shape, settings.seed, settings.device)
    train(task, run.stage("tiny"), settings, say)
    run.save("vae_tiny", task.model)


def denoiser(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the text encoder and the UNet; those of `--start` go on, if there is one."""
    material = _material(run, data, shape, settings)
    model = new_denoiser(shape, material.tokenizer, settings.seed) if run.start is None else read_denoiser(run.start)
    task = DenoiserTask(model, material, scheduler_of(run))
    train(task, run.stage("denoiser"), settings, say)
    run.save("text_encoder", task.model.text)
    run.save("unet", task.model.unet)


def distil(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Teach a copy of the UNet to draw in few steps."""
    material = _material(run, data, shape, settings)
    teacher = read_denoiser(run.part("text_encoder").parent)
    task = DistilTask(teacher, material, scheduler_of(run))
    train(task, run.stage("distil"), settings, say)
    run.save("unet_distilled", task.model)


def scheduler_of(run: Run) -> Any:
    """The noise that the denoiser is trained on: that of `--start`, or a new model's."""
    if run.start is None:
        return new_scheduler()
    return DDIMScheduler.from_pretrained(str(run.start / "scheduler"), local_files_only=True)


def few_steps(scheduler: Any) -> Any:
    """The sampler of a distilled UNet."""
    return LCMScheduler.from_config(scheduler.config)


TRAINED: dict[str, Train] = {"judge": judge, "vae": vae, "tiny": tiny, "denoiser": denoiser, "distil": distil}


def _material(run: Run, data: Path, shape: Shape, settings: Settings) -> Material:
    return Material(_pictures(data, shape.side), _vae(run), _tokenizer(run), settings.seed, settings.device)


def _pictures(data: Path, side: int) -> Pictures:
    return read_pack(data, side).part(held_out=False)


def _tokenizer(run: Run) -> Any:
    return load_tokenizer(run.part("tokenizer"))


def _vae(run: Run) -> Any:
    folder = str(run.part("vae"))
    return AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
