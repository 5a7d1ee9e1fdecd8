"""A preset's `[scheduler]` in place of what a source says: a single file can't tell that its model was distilled.

Settings have the names of Diffusers' `scheduler_config.json`. Those that the preset leaves out stay the source's, as
with `Scheduler.from_config(other.config, …)`; of another class those that it knows.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.sources.base import LOADERS, Loaded, class_named

CLASS = "_class_name"
CLASSES = tuple(name for name in LOADERS if name.endswith("Scheduler"))
FILE = "scheduler/scheduler_config.json"


def rescheduled(loaded: Loaded, said: Mapping[str, Any]) -> Loaded:
    """The source with these settings. Raises ExportError for one that its class does not know or take."""
    own = json.loads((loaded.folder / FILE).read_text(encoding="utf-8"))
    kind = class_named(said.get(CLASS, own[CLASS]))
    known = [name for name in inspect.signature(kind).parameters if name != "kwargs"]
    for name in said:
        if name not in (CLASS, *known):
            raise ExportError(
                f"the preset's 'scheduler.{name}' is no setting of {kind.__name__}; allowed: {', '.join(sorted(known))}"
            )
    settings = {name: value for name, value in {**own, **said}.items() if name in known}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded.pipe.scheduler = kind(**settings)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"the preset's scheduler can't be made as {kind.__name__}: {reason}") from error
    return replace(loaded, scheduler={CLASS: kind.__name__, **settings})
