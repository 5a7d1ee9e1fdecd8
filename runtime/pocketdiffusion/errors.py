"""Every error that this package raises on purpose.

::

    PocketDiffusionError              exit code 1
    ├── InvalidRequest                a parameter that can't be served (also a ValueError; exit code 2)
    ├── BundleError                   a model folder that can't be used
    │   ├── BundleNotFound            no such name or folder
    │   ├── BundleCorrupt             a file is missing, cut short or altered
    │   ├── BundleUnsafe              a path leaves the bundle, or a file holds what is never read
    │   └── BundleUnsupported         a newer format, another family, a capability that was not exported
    ├── BackendError
    │   ├── BackendUnavailable        the engine or the device is not here
    │   ├── DeviceNotAttached         the engine opened the graph, but not on the device that was asked for
    │   ├── GraphFailed               the engine refused or failed to run a graph
    │   └── LoadCrashed               the engine died or hung when it tried a graph of unknown origin
    ├── NonFinite                     a graph produced NaN or infinity
    └── OutputFailed                  a finished picture could not be written

Each message is one line: what was asked, what was found, what is allowed, what to do next.
"""

from __future__ import annotations

from pathlib import Path


class PocketDiffusionError(Exception):
    """Base of all errors of this package. `exit_code` is what the command line returns."""

    exit_code = 1


class InvalidRequest(PocketDiffusionError, ValueError):
    """A parameter has a value that can't be served. `parameter` is its name in the Python API."""

    exit_code = 2

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class BundleError(PocketDiffusionError):
    """A model folder can't be used."""


class BundleNotFound(BundleError):
    """No bundle of that name, or no such folder."""


class _BundleFileError(BundleError):
    """An error that names the file of a bundle and the reason."""

    def __init__(self, file: str | Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason


class BundleCorrupt(_BundleFileError):
    """A file of the bundle is missing, cut short, altered or malformed."""


class BundleUnsafe(_BundleFileError):
    """A path would leave the bundle, or a file holds something that is never read (pickle, devices, links outside)."""


class BundleUnsupported(BundleError):
    """A sound bundle that this version, or this export of it, can't serve."""


class BackendError(PocketDiffusionError):
    """An engine is missing or failed."""


class BackendUnavailable(BackendError):
    """The engine is not installed, or it does not see the device that was asked for."""


class DeviceNotAttached(BackendError):
    """The engine opened the graph somewhere else than on the device that was asked for."""


class GraphFailed(BackendError):
    """The engine could not open or run a graph."""


class LoadCrashed(BackendError):
    """A graph made the engine die or hang, in a child process that tried it first."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


class OutputFailed(PocketDiffusionError):
    """A finished picture could not be written: the disk is full, the folder is gone or read-only."""


class NonFinite(PocketDiffusionError):
    """A component's output held NaN or infinity. Attributes: component, output, precision, device, step (or None)."""

    def __init__(
        self, component: str, output: str, *, precision: str, device: str, bad: int, size: int, step: int | None = None
    ) -> None:
        where = "" if step is None else f" at step {step + 1}"
        super().__init__(
            f"{component} produced {bad} NaN or infinite values of {size} in '{output}'{where} "
            f"({precision} on {device}); no image was made: try another device or precision, e.g. onnxruntime:cpu"
        )
        self.component, self.output, self.precision, self.device = component, output, precision, device
        self.bad, self.size, self.step = bad, size, step

    def at_step(self, step: int) -> NonFinite:
        """The same error with the sampling step (counted from 0) in it."""
        return NonFinite(
            self.component,
            self.output,
            precision=self.precision,
            device=self.device,
            bad=self.bad,
            size=self.size,
            step=step,
        )
