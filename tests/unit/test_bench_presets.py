"""The table of quality presets."""

from __future__ import annotations

import numpy as np
import pytest

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion_bench import presets
from pocketdiffusion_bench.presets import Drawn


def test_a_row_holds_median_and_worst() -> None:
    black, grey = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 51, np.uint8)
    exact, drawn = Drawn((black,) * 3, 25), Drawn((black, black, grey), 5)
    line = presets.row("fast", exact, drawn, Drawn((grey,) * 3, 5))
    # 20 log10(255 / 51) dB
    assert line.startswith("fast | 5 of 25 (80% saved) | 99.0 (14.0) | 1.000 (0.")
    assert line.endswith("| 14.0")


def test_the_table_has_a_row_for_each_preset_and_count(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr("sys.argv", ["presets", "--prompts", "12", "--steps", "9", "--computed", "7"])
    assert presets.main() == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {7}
    assert [row.split(" | ")[1] for row in rows] == ["balanced", "fast", "computed_steps=7"]
    assert [row.split(" | ")[2] for row in rows] == ["8 of 9 (11% saved)", "6 of 9 (33% saved)", "7 of 9 (22% saved)"]
