"""Checkpoints: safetensors in pieces that a small file limit lets through, written beside the old one and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PIECE = 15 << 20
"""Bytes of the tensors in one file; a tensor that is larger has a file of its own."""
META = "meta.json"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Replace the checkpoint in `folder`; a killed run leaves the old one or the new one."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    for index, piece in enumerate(pieces(tensors)):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in piece.items()}, new / _name(index))
    (new / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The checkpoint in `folder`, or the one that a killed run had put aside; None without any."""
    for place in (folder, folder.with_name(folder.name + ".old")):
        if (place / META).is_file():
            files = sorted(place.glob("*.safetensors"))
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            return tensors, json.loads((place / META).read_text(encoding="utf-8"))
    return None


def pieces(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors in groups of at most `PIECE` bytes, in their order."""
    groups: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not groups or size > room:
            groups.append({})
            room = PIECE
        groups[-1][name] = tensor
        room -= size
    return groups


def _name(index: int) -> str:
    return f"piece-{index:03d}.safetensors"
