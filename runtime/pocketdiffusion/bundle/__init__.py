"""Bundles: exported model folders, found, checked and opened before an engine sees a file of them."""

from pocketdiffusion.bundle.bundle import Bundle
from pocketdiffusion.bundle.integrity import file_entries, write_manifest
from pocketdiffusion.bundle.manifest_json import MANIFEST, dump_manifest, parse_manifest

__all__ = ["MANIFEST", "Bundle", "dump_manifest", "file_entries", "parse_manifest", "write_manifest"]
