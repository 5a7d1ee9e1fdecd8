"""Switches the telemetry of every engine off.

ONNX Runtime's wheels keep a database of events in the user's cache and upload it (their `Privacy.md`), unless a
variable is set when the library is loaded. ``import openvino`` sends an event to Google Analytics and writes
``~/intel/stats`` by `openvino_telemetry`, which has no variable; where that module can't be imported, OpenVINO uses an
empty stand-in of its own. So this module runs before an engine is imported and loads only the standard library.

Limit: ONNX Runtime builds that use Windows' tracing ignore the variable; the backend switches them off once imported.
"""

from __future__ import annotations

import os
import sys
import warnings

VARIABLES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",  # the same switch in early builds
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
OPENVINO_SENDER = "openvino_telemetry"


def disable() -> None:
    """Switch it off in this process, overriding other values. Warns once for engines that were imported before."""
    early = {
        "onnxruntime": os.environ.get("ORT_DISABLE_TELEMETRY") != "1",
        "openvino": sys.modules.get(OPENVINO_SENDER) is not None,
    }
    too_late = [engine for engine, sends in early.items() if sends and engine in sys.modules]
    os.environ.update(VARIABLES)
    sys.modules[OPENVINO_SENDER] = None  # type: ignore[assignment]  # makes its import fail
    if too_late:
        warnings.warn(
            f"{' and '.join(too_late)} was imported before pocketdiffusion, so its telemetry may be on in this "
            "process; import pocketdiffusion first",
            RuntimeWarning,
            stacklevel=2,
        )
