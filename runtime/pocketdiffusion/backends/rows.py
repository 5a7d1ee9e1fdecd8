"""Calls of many rows as calls of few: for graphs of a fixed batch, and where several rows take too much memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pocketdiffusion.tensors import AnyArray, TensorSpec


def fixed_batch(inputs: Mapping[str, TensorSpec]) -> int | None:
    """The rows that a graph takes, if it takes no others. Inputs of fewer than two axes have no rows."""
    batches = {spec.shape[0] for spec in inputs.values() if len(spec.shape) > 1}
    (batch,) = batches if len(batches) == 1 else (None,)
    return batch if isinstance(batch, int) else None


def count_rows(feeds: Mapping[str, AnyArray]) -> int:
    """Rows of a call; 0 where no input has any."""
    return max((len(array) for array in feeds.values() if np.ndim(array) > 1), default=0)


def in_turn(feeds: Mapping[str, AnyArray], batch: int) -> list[dict[str, AnyArray]]:
    """Calls of `batch` rows each, the last filled up with copies of the last row; one call where there are no rows."""
    rows = count_rows(feeds)
    if rows in (0, batch):
        return [dict(feeds)]
    calls = []
    for start in range(0, rows, batch):
        taken = np.minimum(np.arange(start, start + batch), rows - 1)
        calls.append({name: a[taken] if _has_rows(a, rows) else a for name, a in feeds.items()})
    return calls


def joined(calls: Sequence[Mapping[str, AnyArray]], rows: int) -> dict[str, AnyArray]:
    """The outputs of calls in turn as those of one call of so many rows."""
    if rows == 0:
        return dict(calls[0])
    arrays = {name: [call[name] for call in calls] for name in calls[0]}
    return {name: (each[0] if len(each) == 1 else np.concatenate(each))[:rows] for name, each in arrays.items()}


def _has_rows(array: AnyArray, rows: int) -> bool:
    """One axis may be rows as well: timesteps, one for each."""
    return np.ndim(array) > 1 or (np.ndim(array) == 1 and len(array) == rows > 1)
