"""What each training stage reads, trains and leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from sticker_train.denoiser import DenoiserTask, Material, new_denoiser, new_scheduler, read_denoiser
from sticker_train.distil import DistilTask
from sticker_train.judge import SIDE as JUDGED_SIDE
from sticker_train.judge import JudgeTask, load_tokenizer
from sticker_train.loop import Say, Settings, train
from sticker_train.pack import Pictures, read_pack
from sticker_train.run import Run
from sticker_train.shapes import Shape
from sticker_train.tokens import train_tokenizer
from sticker_train.vae import GrownTask, TinyTask, VaeTask, measure

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
    """Train the VAE and measure its latents; with `--start`, grow one that keeps the latents of the VAE there."""
    pictures = _pictures(data, shape.side)
    if run.start is None:
        task: VaeTask | GrownTask = VaeTask(pictures, shape, settings.seed, settings.device)
    else:
        task = GrownTask(pictures, _read_vae(run.start / "vae"), shape, settings.seed, settings.device)
    train(task, run.stage("vae"), settings, say)
    if run.start is None:
        measure(task.model, pictures)
    run.save("vae", task.model)


def tiny(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the tiny decoder to do the VAE's work."""
    task = TinyTask(_pictures(data, shape.side), _vae(run), shape, settings.seed, settings.device)
    train(task, run.stage("tiny"), settings, say)
    run.save("tiny_vae", task.model)


def denoiser(run: Run, data: Path, shape: Shape, settings: Settings, say: Say) -> None:
    """Train the text encoder and the UNet; those of `--start` go on, if there is one."""
    material = _material(run, data, shape, settings)
    model = new_denoiser(shape, material.tokenizer, settings.seed) if run.start is None else read_denoiser(run.start)
    scheduler = new_scheduler()
    task = DenoiserTask(model, material, scheduler)
    train(task, run.stage("denoiser"), settings, say)
    scheduler.save_pretrained(str(run.new("scheduler")))
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
    """The noise that the denoiser was trained on."""
    return DDIMScheduler.from_pretrained(str(run.part("scheduler")), local_files_only=True)


def second_order(scheduler: Any) -> Any:
    """The sampler of a UNet that is not distilled: eight steps are enough (DPM-Solver++, arXiv:2211.01095)."""
    kept = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "timestep_spacing")
    numbers = {name: scheduler.config[name] for name in (*kept, "rescale_betas_zero_snr", "steps_offset")}
    return DPMSolverMultistepScheduler(**numbers)


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
    return _read_vae(run.part("vae"))


def _read_vae(folder: Path) -> Any:
    return AutoencoderKL.from_pretrained(str(folder), local_files_only=True, low_cpu_mem_usage=False)
