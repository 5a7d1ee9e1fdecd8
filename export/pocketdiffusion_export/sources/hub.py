"""`hub:OWNER/NAME[/FILE.safetensors][@REVISION]`: a model on the Hugging Face hub, checked by hash.

The only source that uses a network, and only because its prefix asks for it. huggingface_hub downloads into its own
cache, goes on where an interrupted download stopped, and shows progress; what a user set for it counts (HF_ENDPOINT,
HF_HOME, HF_TOKEN or `hf auth login`, HF_HUB_OFFLINE). No token is sent unless one was set, its telemetry is off.
Fetched are JSON, tokenizer text and safetensors, never a pickle; a file whose hash is not what the hub says is removed.
Limits: hashes are the hub's own word for what the owner put there; a tiny VAE beside the model is not fetched.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion import __version__
from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sources import diffusers_folder
from pocketdiffusion_export.sources.base import WEIGHTED, sha256

PREFIX = "hub:"
LIGHT = (".json", ".txt")
"""Endings of configs and tokenizer files."""
TOLD_BYTES = 1_000_000
"""The download of a file of so many bytes is announced."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_FORM = re.compile(rf"hub:({_NAME}/{_NAME})(?:/([^@\\]+\.safetensors))?(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Address:
    """What a source's text asks for."""

    repository: str
    """OWNER/NAME."""
    file: str | None
    """A single-file checkpoint in it; None is the Diffusers folder that it is."""
    revision: str | None
    """Branch, tag or commit; None is the main branch."""

    def __str__(self) -> str:
        return PREFIX + self.repository + (f"/{self.file}" if self.file else "")


def parse(source: str) -> Address:
    """The address. Raises ExportError for a text of another form."""
    found = _FORM.fullmatch(source)
    if found is None:
        raise ExportError(
            f"'{source}' is no model on the hub; give hub:OWNER/NAME, with /FILE.safetensors or @REVISION"
        )
    return Address(found[1], found[2], found[3])


def download(source: str, say: Say) -> tuple[Path, str]:
    """The model's folder or checkpoint in the hub's cache, and its address with the commit; needs no torch.

    `say` gets a line before each large file. Raises ExportError in one line for what is not there, not given to this
    user, damaged, or can't be exported.
    """
    address = parse(source)
    with _one_line(address):
        hub = _Hub(address, say)
        wanted = _folder(hub) if address.file is None else _checkpoint(hub, address.file)
        hub.require_space(wanted)
        places = [hub.fetch(name) for name in wanted]
    place = places[0].parent if address.file is None else places[0]
    return place, f"{str(address).removeprefix(PREFIX)}@{hub.commit}"


def _folder(hub: _Hub) -> list[str]:
    """Files of a Diffusers folder, the index first."""
    if diffusers_folder.INDEX not in hub.files:
        files = [name for name in hub.files if name.endswith(".safetensors") and "/" not in name]
        instead = f"a checkpoint in it: {hub.address}/{files[0]}" if files else "another model"
        raise ExportError(f"{hub.address} holds no {diffusers_folder.INDEX}; give {instead}")
    index = diffusers_folder.read_index(hub.fetch(diffusers_folder.INDEX))
    wanted = [diffusers_folder.INDEX]
    for part in diffusers_folder.parts_named(index):
        names = [name.removeprefix(f"{part}/") for name in hub.files if name.startswith(f"{part}/")]
        names = [name for name in names if "/" not in name]
        wanted += [f"{part}/{name}" for name in names if name.endswith(LIGHT)]
        if part in WEIGHTED:
            stem = diffusers_folder.stem_of(part)
            weights = diffusers_folder.weight_names(names, stem, f"{hub.address}/{part}")
            wanted += [f"{part}/{name}" for name in weights]
    return wanted


def _checkpoint(hub: _Hub, file: str) -> list[str]:
    """A single-file checkpoint, and then the notes beside it."""
    if file not in hub.files:
        known = ", ".join(name for name in hub.files if name.endswith(".safetensors")) or "none"
        raise ExportError(f"{hub.address.repository} holds no {file}; its safetensors files: {known}")
    return [file, *(name for name in hub.files if name == str(Path(file).with_suffix(".yaml").as_posix()))]


class _Hub:
    """One revision of a repository."""

    def __init__(self, address: Address, say: Say) -> None:
        from huggingface_hub import HfApi

        self.address, self._say = address, say
        self._api = HfApi(library_name="pocketdiffusion", library_version=__version__)
        info = self._api.model_info(address.repository, revision=address.revision, files_metadata=True)
        self.commit = str(info.sha)
        self.files: Mapping[str, Any] = {file.rfilename: file for file in info.siblings or ()}

    def require_space(self, names: Iterable[str]) -> None:
        """Raise ExportError when what is still to be downloaded does not fit on the disk."""
        from huggingface_hub.constants import HF_HUB_CACHE

        needed = sum(self.files[name].size or 0 for name in names if self._cached(name) is None)
        holder = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if folder.exists())
        free = shutil.disk_usage(holder).free
        if needed > free:
            raise ExportError(
                f"{self.address} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free at {holder}; free space, or "
                "set HF_HOME to another folder"
            )

    def fetch(self, name: str) -> Path:
        """A file, in the hub's cache. Raises ExportError when its content is not what the hub says, and removes it."""
        size = self.files[name].size or 0
        if size >= TOLD_BYTES and self._cached(name) is None:
            self._say(f"downloading {name}, {size / 1e6:,.0f} MB")
        place = Path(self._api.hf_hub_download(self.address.repository, name, revision=self.commit))
        self._check(name, place)
        return place

    def _cached(self, name: str) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.address.repository, name, revision=self.commit)
        return found if isinstance(found, str) else None

    def _check(self, name: str, place: Path) -> None:
        large = self.files[name].lfs
        expected = self.files[name].blob_id if large is None else large.sha256
        found = _git_hash(place) if large is None else sha256(place)
        if found == expected:
            return
        place.resolve().unlink()
        place.unlink(missing_ok=True)
        raise ExportError(
            f"{self.address}: {name} has the hash {found} where the hub says {expected}; it was removed, run again to "
            "download it anew"
        )


def _git_hash(file: Path) -> str:
    """The name that git gives a file's content, 40 hexadecimal digits: for small files the hub keeps no other."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def _one_line(address: Address) -> Iterator[None]:
    """What goes wrong on the way to the hub, as ExportError."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise ExportError(
            f"{address} is given to those who accepted its terms: do so at {constants.ENDPOINT}/{address.repository}, "
            "then set HF_TOKEN, or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"the hub has no {address.repository}, or keeps it private; check the name, or set HF_TOKEN for a "
            "private one"
        ) from None
    except errors.RevisionNotFoundError:
        raise ExportError(f"{address} has no revision '{address.revision}'; leave it out for the newest") from None
    except errors.OfflineModeIsEnabled:
        raise ExportError(
            f"{address} is on the hub, and HF_HUB_OFFLINE forbids to ask it; give the folder of a model that is here"
        ) from None
    except OSError as error:  # what requests raises is of this kind, as is a disk that fills up
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ExportError(
            f"{address} can't be downloaded from {constants.ENDPOINT} ({reason}); run again when it can be reached, "
            "which goes on where this stopped, or give the folder of a model that is here"
        ) from None
