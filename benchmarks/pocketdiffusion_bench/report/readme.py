"""Tables in a Markdown file, made from committed results.

The file itself names its sources, relative to its own folder, and if it wants fewer the columns::

    <!-- bench benchmarks/results/sd15.jsonl | case; s/image; peak RSS, MB -->
    (what stands here is replaced)
    <!-- /bench -->

"presets" in the place of "bench" makes the table of `python -m pocketdiffusion_bench.presets`, whose columns are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.report import techniques
from pocketdiffusion_bench.report.jsons import read
from pocketdiffusion_bench.report.markdown import COLUMNS, table

_BEGIN = re.compile(r"<!-- (?P<kind>bench|presets) (?P<files>[^|\n]+?)(?: \| (?P<columns>[^\n]+?))? -->\n")


def fill(text: str, folder: Path) -> str:
    """The text with every table made anew. Raises BenchError: no such file or column, a mark without its end."""
    begin = _BEGIN.search(text)
    if begin is None:
        return text
    before, rest = text[: begin.end()], text[begin.end() :]
    mark = f"<!-- /{begin['kind']} -->"
    old, end, after = rest.partition(mark)
    if not end or _BEGIN.search(old):
        raise BenchError(f"'{begin[0].strip()}' has no '{mark}' after it; add that line")
    files = [folder / name for name in begin["files"].split()]
    return before + _table(begin["kind"], files, begin["columns"]) + end + fill(after, folder)


def _table(kind: str, files: Sequence[Path], columns: str | None) -> str:
    if kind == "bench":
        return table(read(files), _columns(columns))
    if columns is not None:
        raise BenchError(f"the table of presets has its own columns; leave '| {columns}' out")
    return techniques.table(techniques.read(files))


def _columns(given: str | None) -> list[str]:
    names = list(COLUMNS) if given is None else [name.strip() for name in given.split(";")]
    for name in names:
        if name not in COLUMNS:
            raise BenchError(f"no column '{name}' in the table; choose from {'; '.join(COLUMNS)}")
    return names
