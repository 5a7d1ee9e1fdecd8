"""The folder of one training: checkpoints of each stage, and the finished parts that the next ones read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sticker_train.pack import DataError

SHARD = "15MB"
"""Of a part's weight files, so that each passes a small file limit."""
TINY = "tiny_vae"
STAGES = {
    "tokenizer": "tokenizer",
    "vae": "vae",
    TINY: "tiny",
    "text_encoder": "denoiser",
    "scheduler": "denoiser",
    "unet": "denoiser",
    "unet_distilled": "distil",
    "judge_text": "judge",
    "judge_image": "judge",
}
"""Part -> the stage that makes it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training's folder."""

    folder: Path
    start: Path | None = None
    """A Diffusers folder whose parts stand in for those that are not made yet."""

    def stage(self, name: str) -> Path:
        """Where a stage keeps its checkpoint and curve."""
        return self.folder / name

    def part(self, name: str) -> Path:
        """A finished part. Raises DataError where there is none."""
        places = [self.folder / "parts", *([] if self.start is None else [self.start])]
        for place in places:
            if (place / name).is_dir():
                return place / name
        raise DataError(
            f"no {name} in {' or '.join(map(str, places))}; run the stage `{STAGES[name]}` first, or give a Diffusers "
            "folder to start from with --start"
        )

    def has(self, name: str) -> bool:
        """Whether the run has made the part itself."""
        return (self.folder / "parts" / name).is_dir()

    def new(self, name: str) -> Path:
        """Where a part is to be written, empty."""
        place = self.folder / "parts" / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def save(self, name: str, model: Any) -> None:
        """Write a part of Diffusers or transformers."""
        model.cpu().eval().save_pretrained(str(self.new(name)), max_shard_size=SHARD)


def hand_over(run: Run, folder: Path, scheduler: Any, *, distilled: bool) -> tuple[str, ...]:
    """Write the Diffusers folder that `pocketdiffusion export` reads, and say what is in it.

    `distilled` takes the UNet for few steps. The judge and the tiny decoder are in it if the run has them. Raises
    DataError for a part that is missing.
    """
    parts = {
        "tokenizer": run.part("tokenizer"),
        "text_encoder": run.part("text_encoder"),
        "unet": run.part("unet_distilled" if distilled else "unet"),
        "vae": run.part("vae"),
        **{name: run.part(name) for name in ("judge_text", "judge_image", TINY) if run.has(name)},
    }
    shutil.rmtree(folder, ignore_errors=True)
    for name, place in parts.items():
        shutil.copytree(place, folder / name)
    _pack_json(folder / "tokenizer/tokenizer.json")
    scheduler.save_pretrained(str(folder / "scheduler"))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "requires_safety_checker": False,
        **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        **{name: _class(folder / name) for name in parts if name != TINY},  # pipelines know no second VAE
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return tuple(parts)


def _pack_json(file: Path) -> None:
    """Write a file without its blanks, which are half of it."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8", newline="\n")


def _class(folder: Path) -> list[str]:
    """Library and class, as a model_index.json names them."""
    for file, key, library in (
        ("tokenizer_config.json", "tokenizer_class", "transformers"),
        ("config.json", "_class_name", "diffusers"),
        ("config.json", "architectures", "transformers"),
    ):
        if (folder / file).is_file():
            config: Mapping[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
            if key in config:
                found = config[key]
                return [library, found if isinstance(found, str) else found[0]]
    raise DataError(f"{folder} says no class in its config; run its stage again")
