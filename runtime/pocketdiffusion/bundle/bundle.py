"""A model folder, opened and checked before an engine sees a file.

Everything that is known of a bundle comes from its manifest; everything that is handed out was listed there, had the
size and sha256 given there and passed the checks of `content`. What was verified before is not hashed again as long as
no file changed (see `integrity`). The folder of another exporter has no manifest.json: `foreign` makes a manifest
without hashes, and everything else is checked in the same way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketdiffusion.bundle import paths
from pocketdiffusion.bundle.content import check_content
from pocketdiffusion.bundle.foreign import read_foreign
from pocketdiffusion.bundle.integrity import Records, check_hashes, marks, read_file
from pocketdiffusion.bundle.manifest import Manifest
from pocketdiffusion.bundle.manifest_json import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    manifest_digest,
    parse_manifest,
)
from pocketdiffusion.bundle.models import require_model
from pocketdiffusion.bundle.strict_json import MAX_BYTES, load_json, short
from pocketdiffusion.errors import BundleCorrupt, BundleUnsupported


@dataclass(frozen=True, slots=True)
class Bundle:
    """An exported model folder. Made by `Bundle.open`."""

    path: Path
    """The real folder, absolute."""
    manifest: Manifest
    digest: str
    """sha256 of the manifest's content, which holds the sha256 of every file: it names the bundle's exact contents.
    Where `hashed` is False it stands for names, sizes and configs only (`foreign.Foreign.digest`)."""
    hashed: bool = True
    """False for the folder of another exporter: nothing says what its graphs and weights should be."""
    notes: tuple[str, ...] = ()
    """What was chosen or left out in such a folder, for people."""

    @classmethod
    def open(cls, path: str | Path, *, variant: str | None = None, cache_dir: Path | None = None) -> Bundle:
        """Check a bundle and open it. `cache_dir` replaces the user's cache folder.

        `variant` chooses among the graphs of another exporter's folder, e.g. "fp16" for ``model_fp16.onnx``. Raises
        BundleNotFound, BundleUnsupported (no or a newer manifest, no such variant), BundleCorrupt, BundleUnsafe.
        """
        root = require_model(Path(path)).resolve()
        bundle = cls._described(root, variant)
        manifest = bundle.manifest
        records = Records(paths.cache_dir() if cache_dir is None else cache_dir)
        found = marks(root, manifest.files)
        if not records.holds(root, bundle.digest, found):
            bundle.verify_all()
            if marks(root, manifest.files) != found:
                raise BundleCorrupt(root, "changed while it was checked; try again")
            records.add(root, bundle.digest, found)
        return bundle

    @classmethod
    def _described(cls, root: Path, variant: str | None) -> Bundle:
        """The bundle with its manifest, of which nothing is checked yet."""
        if not os.path.lexists(root / MANIFEST):
            found = read_foreign(root, variant)
            return cls(root, found.manifest, found.digest, hashed=False, notes=found.notes)
        if variant is not None:
            raise BundleUnsupported(f"{root} has a {MANIFEST}, which names its graphs; leave variant out")
        manifest = parse_manifest(read_file(root, MANIFEST, MAX_MANIFEST_BYTES))
        return cls(root, manifest, manifest_digest(manifest))

    def verify_all(self) -> None:
        """Check sizes, hashes and contents of all files, whatever was verified before. Raises as `open` does."""
        marks(self.path, self.manifest.files)
        check_hashes(self.path, [entry for entry in self.manifest.files if entry.sha256])
        check_content(self.path, self.manifest)

    @property
    def size_bytes(self) -> int:
        """Sum of the files' sizes, without manifest.json."""
        return sum(entry.size for entry in self.manifest.files)

    def graph(self, component: str) -> Path:
        """The file (for Core ML: the package) that an engine opens. Raises BundleUnsupported."""
        entry = self.manifest.components.get(component)
        if entry is None:
            known = ", ".join(self.manifest.components)
            raise BundleUnsupported(f"{self.manifest.name} has no component {short(component)}, it has: {known}")
        return self.path / entry.graph

    def file(self, relative: str) -> Path:
        """A listed file, by its path in the manifest. Raises BundleUnsupported for any other."""
        if all(entry.path != relative for entry in self.manifest.files):
            raise BundleUnsupported(f"{self.manifest.name} has no file {short(relative)} in its manifest")
        return self.path / relative

    def read_json(self, relative: str) -> Any:
        """The value of a listed JSON file. Raises BundleUnsupported, BundleCorrupt, BundleUnsafe."""
        self.file(relative)
        return load_json(read_file(self.path, relative, MAX_BYTES), relative, config=True)
