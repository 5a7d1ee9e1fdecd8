"""Kinds of sources, one file each; `pocketdiffusion_export.source.load` tells them apart."""
