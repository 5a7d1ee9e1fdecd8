"""The table of quality presets and single techniques."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pocketdiffusion.pipeline import Pipeline
from pocketdiffusion.presets import PRESETS
from pocketdiffusion_bench import presets
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.report.readme import fill
from pocketdiffusion_bench.report.techniques import HEAD, Outcome, read, table

FOUND = Outcome("preset=fast", "m", "DDIM", 20, 3.5, 10, 40, 0.5, (30.0, 20.0, 28.0), (0.9, 0.8, 1.0), {"cpu": "X"})


def test_a_row_holds_gain_and_loss() -> None:
    assert FOUND.row() == (
        "| DDIM, 20 steps, 3 prompts | `preset=fast` | 10 of 40 (75% saved) | 0.50 "
        "| 28.0 / 26.0 / 20.0 | 0.900 / 0.900 / 0.800 |"
    )


def test_outcomes_are_read_as_written_and_fill_a_readme(tmp_path: Path) -> None:
    outcomes = [FOUND, replace(FOUND, technique="preset=balanced")]
    (tmp_path / "a.jsonl").write_text("".join(f"{each.line()}\n" for each in outcomes), encoding="utf-8")
    assert read([tmp_path / "a.jsonl"]) == outcomes
    filled = fill("<!-- presets a.jsonl -->\nold\n<!-- /presets -->\n", tmp_path)
    assert filled == f"<!-- presets a.jsonl -->\n{table(outcomes)}<!-- /presets -->\n"
    assert filled.count("m, guidance 3.5. Measured on: X.") == 1
    with pytest.raises(BenchError, match="has its own columns"):
        fill("<!-- presets a.jsonl | time -->\n<!-- /presets -->\n", tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"psnr_db": [], "ssim": []}'])
def test_what_is_no_outcome_is_told_by_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{FOUND.line()}\n{text}\n", encoding="utf-8")
    with pytest.raises(BenchError, match="a.jsonl:2 is no outcome"):
        read([tmp_path / "a.jsonl"])


def test_the_table_has_a_row_for_each_technique(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.setattr("sys.argv", ["presets", "--prompts", "12", "--steps", "9", "--singles"])
    assert presets.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines[:2]) == HEAD
    rows = {line.split(" | ")[1].strip("`"): line.split(" | ")[2] for line in lines[2 : lines.index("")]}
    assert list(rows) == list(presets.techniques(singles=True))
    assert all(int(rows[f"preset={name}"].split(" ")[0]) < 12 for name in PRESETS if name != "exact")
    assert rows["computed_steps=5"] == rows["num_inference_steps=5"] == "10 of 18 (44% saved)"
    assert rows["guidance_interval=0..0.7"] == rows["guidance_hold=0.7"]


def test_another_bundle_is_held_against_the_first(
    pipe: Pipeline,
    make_pipe: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened: list[str] = []

    def open_pipe(model: str, **options: object) -> Pipeline:
        opened.append(model)
        return pipe if model == "sticker" else make_pipe()

    monkeypatch.setattr(Pipeline, "from_pretrained", open_pipe)
    monkeypatch.setattr("sys.argv", ["presets", "--prompts", "2", "--steps", "9", "--variant", "fewer keys", "other"])
    assert presets.main() == 0
    assert opened == ["sticker", "other"]
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[1].strip("`"): line.split(" | ")[2] for line in lines[2 : lines.index("")]}
    plain = [f"preset={name}" for name in PRESETS if name != "exact"]
    assert list(rows) == [*plain, "fewer keys", *(f"fewer keys, {name}" for name in plain)]
    assert rows["fewer keys"] == "18 of 18 (0% saved)"
    assert all(rows[f"fewer keys, {name}"] == rows[name] for name in plain)
