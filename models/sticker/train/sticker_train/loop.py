"""The training loop that all stages share: AdamW, warm-up and cosine, clipping, an average of the weights, checkpoints.

A run ends at its steps or at its minutes; started again in the same folder it goes on where it was. Its course is in
`curve.jsonl`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from sticker_train import checkpoint
from sticker_train.optimizer import Muon

Say = Callable[[str], None]
CHECKPOINT = "checkpoint"
CURVE = "curve.jsonl"
SAVE_SECONDS = 120.0
LOG_STEPS = 25


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how fast a stage trains."""

    steps: int
    batch: int
    rate: float
    """Learning rate after the warm-up."""
    minutes: float | None = None
    """Of this call; None is no limit."""
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    """Of what autocast finds safe: float32 or bfloat16; weights, norms and losses stay float32."""
    matrices: bool = False
    """Whether weights of two dimensions and more are moved by Muon."""
    warm_up: int = 100
    average: float = 0.999
    """Decay of the weights' moving average, which is what a stage hands on."""
    decay: float = 0.01
    clip: float = 1.0


class Task(Protocol):
    """What a stage trains."""

    model: torch.nn.Module
    """Everything with weights that change."""

    def loss(self, step: int, size: int) -> torch.Tensor:
        """The loss of batch `step`, of `size` pictures: the same for the same step."""
        ...


@dataclass
class State:
    """A run between two steps."""

    step: int
    average: dict[str, torch.Tensor]


def train(task: Task, folder: Path, settings: Settings, say: Say) -> None:
    """Train until the steps or the minutes are over; then the model has the averaged weights.

    Raises FloatingPointError when the loss is no number: then the last checkpoint is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    task.model.to(settings.device)
    optimizer = _optimizer(task.model, settings)
    state = _resume(task.model, optimizer, folder, say)
    losses: list[float] = []
    last_save = start
    while state.step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * rate_at(state.step, settings)
        torch.manual_seed(settings.seed * 1_000_003 + state.step)  # dropout, noise and timesteps are the step's too
        losses.append(_step(task, optimizer, state, settings))
        now = time.monotonic()
        if state.step % LOG_STEPS == 0 or state.step == settings.steps:
            _log(folder, state.step, losses, now - start, say)
            losses.clear()
        over = settings.minutes is not None and now - start > settings.minutes * 60
        if over or now - last_save > SAVE_SECONDS:
            _save(task.model, optimizer, state, folder, settings)
            last_save = now
        if over:
            break
    _save(task.model, optimizer, state, folder, settings)
    task.model.load_state_dict(state.average)


def _optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    if settings.matrices:
        return Muon(model, settings.rate, settings.decay)
    return torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.decay)


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate as a part of the full one: a line up, then half a cosine down."""
    if step < settings.warm_up:
        return (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _step(task: Task, optimizer: torch.optim.Optimizer, state: State, settings: Settings) -> float:
    with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        loss = task.loss(state.step, settings.batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {state.step}; lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), settings.clip)
    optimizer.step()
    state.step += 1
    decay = min(settings.average, (1 + state.step) / (10 + state.step))  # short runs need a short memory
    for name, tensor in task.model.state_dict().items():
        kept = state.average[name]
        if tensor.dtype.is_floating_point:
            kept.lerp_(tensor.detach(), 1 - decay)
        else:
            kept.copy_(tensor)
    return value


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, say: Say) -> State:
    weights = model.state_dict()
    found = checkpoint.load(folder / CHECKPOINT)
    if found is None:
        return State(0, {name: tensor.detach().clone() for name, tensor in weights.items()})
    tensors, meta = found
    device = next(iter(weights.values())).device
    model.load_state_dict(_group(tensors, "weights/"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    moments = {kind: _group(tensors, f"adam/{kind}/") for kind in ("step", "exp_avg", "exp_avg_sq")}
    weights_in_order = [weight for group in optimizer.param_groups for weight in group["params"]]
    found_for = [names[id(weight)] for weight in weights_in_order]
    kept = {
        index: {kind: values[name] for kind, values in moments.items() if name in values}
        for index, name in enumerate(found_for)
        if name in moments["exp_avg"]
    }
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    say(f"going on from step {meta['step']} in {folder}")
    return State(meta["step"], {name: t.to(device) for name, t in _group(tensors, "average/").items()})


def _save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State, folder: Path, settings: Settings
) -> None:
    tensors = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
    for name, parameter in model.named_parameters():
        for kind, moment in optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{kind}/{name}"] = moment
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors takes no shared memory
    checkpoint.save(folder / CHECKPOINT, copies, {"step": state.step, "settings": asdict(settings)})


def _group(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _log(folder: Path, step: int, losses: Iterable[float], seconds: float, say: Say) -> None:
    values = list(losses)
    line = {"step": step, "loss": round(sum(values) / len(values), 5), "seconds": round(seconds, 1)}
    with (folder / CURVE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    say(f"step {step}: loss {line['loss']}, {line['seconds']} s")
