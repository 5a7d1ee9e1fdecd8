"""The JSON and text files of a foreign folder that the runtime uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle.integrity import read_file
from pocketdiffusion.bundle.strict_json import MAX_BYTES, load_json, short
from pocketdiffusion.errors import BundleCorrupt

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"

PREPROCESSOR = "feature_extractor/preprocessor_config.json"
"""What is done to a picture before the safety checker sees it."""

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_FOLDERS = ("text_encoder", "text_encoder_2", "unet", "vae", "vae_decoder", "vae_encoder", "safety_checker")
_IGNORED = "openvino_"
"""OpenVINO's own tokenizer graphs begin with it; the runtime reads the vocabulary that lies beside them."""


class Configs:
    """Reads a folder's configs. `root` must be real."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def bytes(self, relative: str) -> bytes:
        """A config's bytes, at most 64 MiB. Raises BundleCorrupt, BundleUnsafe."""
        return read_file(self._root, relative, MAX_BYTES)

    def read(self, relative: str) -> dict[str, Any]:
        """The object in a JSON file, {} where there is no such file. Raises BundleCorrupt, BundleUnsafe."""
        if not os.path.lexists(self._root / relative):
            return {}
        value = load_json(self.bytes(relative), relative, config=True)
        if not isinstance(value, dict):
            raise BundleCorrupt(relative, f"must be a JSON object, found {short(value)}")
        return value


def list_files(root: Path) -> set[str]:
    """Paths of the configs that are there: the index, the scheduler's, the tokenizers' and those of the graphs."""
    fixed = [INDEX, SCHEDULER, PREPROCESSOR, *(f"{folder}/config.json" for folder in _FOLDERS)]
    found = {path for path in fixed if os.path.lexists(root / path)}
    for folder in _TOKENIZERS:
        for name in names_in(root / folder):
            if name.endswith((".json", ".txt")) and not name.startswith(_IGNORED):
                found.add(f"{folder}/{name}")
    return found


def names_in(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted; [] when it can't be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
