"""The benchmark's command line: lists become cases, and what can't be meant is refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pocketdiffusion.cli.values import amount, size
from pocketdiffusion.errors import PocketDiffusionError
from pocketdiffusion_bench import cli
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.options import cases, devices
from pocketdiffusion_bench.record import OK, Record

from .bench_records import make_record


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench")
    cli.configure(parser)
    return parser.parse_args(words)


def test_without_options_there_is_one_case_with_the_models_own_settings() -> None:
    assert cases(parsed("sticker")) == [Case("sticker")]


def test_lists_are_multiplied_and_sizes_stay_pairs() -> None:
    found = cases(parsed("a", "b", "--size", "64x32,128x64", "--steps", "1,2", "--memory-limit", "1GB"))
    assert len(found) == 8
    assert [(case.model, case.steps, case.width, case.height) for case in found[:3]] == [
        *(("a", 1, 64, 32), ("a", 1, 128, 64), ("a", 2, 64, 32)),
    ]
    assert {case.memory_limit for case in found} == {10**9}


def test_presets_are_multiplied_too_and_stand_in_the_label() -> None:
    exact, balanced = cases(parsed("a", "--preset", "exact,balanced"))
    assert (exact.exact, balanced.exact, balanced.label) == (True, False, "a preset=balanced")


def test_equal_cases_are_measured_once() -> None:
    assert len(cases(parsed("a", "a", "--steps", "2,2"))) == 1


def test_a_device_for_each_part_is_one_choice() -> None:
    assert devices("onnxruntime:cpu,openvino:cpu") == ["onnxruntime:cpu", "openvino:cpu"]
    assert devices("denoiser=openvino:gpu,vae=cpu") == ["denoiser=openvino:gpu,vae=cpu"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1000", 1000), ("1kB", 1000), ("1.5GB", 1_500_000_000), ("512MiB", 2**29), ("1 gib", 2**30)],
)
def test_amounts_of_memory(text: str, number: int) -> None:
    assert amount(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1TBB", "1e9", "1,5GB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="800MB"):
        amount(text)


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512*512", "-1x5", "512x512x3", "1234567x1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="512x512"):
        size(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int3"], "choose from float32"),
        (["--steps", "0"], "whole number from 1"),
        (["--steps", "1,,2"], "empty place"),
        (["--guidance", "much"], "is no number"),
        (["--preset", "exact,good"], "'good' is no preset; choose from exact, balanced, fast"),
        (["--runs", "0"], "whole number from 1"),
        (["-o", "xls"], "invalid choice"),
    ],
)
def test_words_that_can_not_be_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("sticker", *words)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peer", "nope"], "no peer 'nope'; choose from"),
        (["--output", "absent/a.md"], "no folder absent"),
        (["--plot", "a.gif"], "choose from .png, .svg"),
        (["--threshold", "3%"], "bench compare"),
        (["--component", "nope"], "no component 'nope'"),
        (["--component", "unet", "--peer", "diffusers"], "leave --peer diffusers out"),
    ],
)
def test_slips_are_told_before_anything_is_measured(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(PocketDiffusionError) as error:
        cli.run(parsed("sticker", *words))
    assert message in str(error.value) and "\n" not in str(error.value)


def bench(monkeypatch: pytest.MonkeyPatch, records: list[Record], *words: str) -> int:
    monkeypatch.setattr(cli, "measure", lambda *args, **given: [])
    monkeypatch.setattr(cli, "appraise", lambda *args: records)
    return cli.run(parsed("sticker", *words))


def test_one_failed_case_of_several_is_shown_and_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = make_record([], status="failed", error="no such device")
    assert bench(monkeypatch, [make_record(), failed]) == 1
    assert "no such device" in capsys.readouterr().out
    assert bench(monkeypatch, [make_record()]) == 0


def test_when_every_case_failed_the_error_is_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = make_record([], status="failed", error="no such device")
    with pytest.raises(BenchError, match="no such device"):
        bench(monkeypatch, [failed, failed])
    assert capsys.readouterr().out == ""


def test_the_ending_of_the_output_names_its_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(monkeypatch, [make_record()], "--output", str(tmp_path / "a.jsonl")) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.jsonl'}\n"
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert f'"status": "{OK}"' in line


def test_compare_takes_its_own_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="required: B.jsonl"):
        cli.run(parsed("compare", "a.jsonl"))
    found: list[argparse.Namespace] = []
    monkeypatch.setattr(cli.compare, "run", lambda args: found.append(args) or 1)
    assert cli.run(parsed("compare", "a.jsonl", "b.jsonl", "--threshold", "5%")) == 1
    assert (found[0].before, found[0].after) == (Path("a.jsonl"), Path("b.jsonl"))
    assert found[0].threshold == pytest.approx(0.05)


def test_cases_can_be_named_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text('{"model": "a", "steps": 2}\n{"model": "b", "peer": "diffusers", "precision": "bfloat16"}\n')
    wanted = [Case("a", steps=2), Case("b", peer="diffusers", precision="bfloat16")]
    assert cases(parsed("--cases", str(file))) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no case"),
        ("{", "line 1 is no JSON"),
        ('{"modell": "a"}', "line 1: write a JSON object"),
        ("[]", "line 1"),
    ],
)
def test_a_wrong_file_of_cases_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(text)
    with pytest.raises(BenchError, match=said):
        cases(parsed("--cases", str(file)))


@pytest.mark.parametrize("words", [(), ("sticker", "--cases", "some.jsonl")])
def test_models_or_cases_are_needed_and_not_both(words: tuple[str, ...]) -> None:
    with pytest.raises(BenchError, match="models or --cases"):
        cli.run(parsed(*words))


def test_the_committed_cases_can_be_read() -> None:
    files = sorted((Path(__file__).parents[2] / "benchmarks/cases").glob("*.jsonl"))
    assert files and all(cases(parsed("--cases", str(file))) for file in files)
