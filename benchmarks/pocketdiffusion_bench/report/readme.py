"""Tables in a Markdown file, made from committed results.

The file itself names its sources, relative to its own folder, and if it wants fewer the columns::

    <!-- bench benchmarks/results/sd15.jsonl | case; s/image; peak RSS, MB -->
    (what stands here is replaced)
    <!-- /bench -->
"""

from __future__ import annotations

import re
from pathlib import Path

from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.report.jsons import read
from pocketdiffusion_bench.report.markdown import COLUMNS, table

_BEGIN = re.compile(r"<!-- bench (?P<files>[^|\n]+?)(?: \| (?P<columns>[^\n]+?))? -->\n")
_END = "<!-- /bench -->"


def fill(text: str, folder: Path) -> str:
    """The text with every table made anew. Raises BenchError: no such file or column, a mark without its end."""
    begin = _BEGIN.search(text)
    if begin is None:
        return text
    before, rest = text[: begin.end()], text[begin.end() :]
    _, end, after = rest.partition(_END)
    if not end or _BEGIN.search(rest[: rest.find(_END)]):
        raise BenchError(f"'{begin[0].strip()}' has no '{_END}' after it; add that line")
    records = read(folder / name for name in begin["files"].split())
    return before + table(records, _columns(begin["columns"])) + end + fill(after, folder)


def _columns(given: str | None) -> list[str]:
    names = list(COLUMNS) if given is None else [name.strip() for name in given.split(";")]
    for name in names:
        if name not in COLUMNS:
            raise BenchError(f"no column '{name}' in the table; choose from {'; '.join(COLUMNS)}")
    return names
