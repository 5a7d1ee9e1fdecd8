"""The command line on the fake engine: what goes to stdout and stderr, and the exit codes."""

from __future__ import annotations

import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from PIL import Image

from pocketdiffusion import cli
from pocketdiffusion.cli.generate import COMMAND
from pocketdiffusion.errors import NonFinite
from pocketdiffusion.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _fake_model(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(lambda cls, *args, **kwargs: pipe))
    monkeypatch.chdir(tmp_path)


def test_prints_the_path_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a", "red", "apple", "--seed", "3", "-o", "out-{seed}.png"]) == 0
    assert capsys.readouterr().out == "out-3.png\n"
    assert Image.open("out-3.png").text["parameters"].startswith("a red apple\n")


def test_the_same_command_gives_the_same_bytes() -> None:
    for name in ("a.png", "b.png"):
        assert cli.main(["generate", "a cat", "--seed", "1", "-o", name, "-q"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_json_tells_seeds_timings_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a cat", "-n", "2", "--seed", "5", "--json", "-o", "{index}.webp"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [image["seed"] for image in report["images"]] == [5, 6]
    assert all(Path(image["path"]).exists() for image in report["images"])
    assert report["configuration"]["unet"]["device"] == "fake:cpu"
    assert len(report["timings"]["step"]) == 5


def test_a_picture_tells_how_it_was_made(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["generate", "a cat", "--seed", "5", "-o", "cat.jpg"])
    capsys.readouterr()
    assert cli.main(["inspect", "cat.jpg", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"]["seed"], found["parameters"]["prompt"]) == (5, "a cat")
    assert found["source"].endswith("trainedAlgorithmicMedia")


def test_the_prompt_stays_out_of_the_file_when_asked_but_the_mark_remains(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["generate", "a secret", "--seed", "5", "-o", "cat.png", "--no-prompt-in-file"])
    capsys.readouterr()
    cli.main(["inspect", "cat.png", "--json"])
    assert json.loads(capsys.readouterr().out)["source"].endswith("trainedAlgorithmicMedia")
    assert b"secret" not in Path("cat.png").read_bytes()


def test_letters_that_stdout_has_no_code_for_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["generate", "a cat 🐱", "--seed", "5", "-o", "cat.png"])
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="cp1252"))
    assert cli.main(["inspect", "cat.png"]) == 0
    sys.stdout.flush()
    assert written.getvalue().startswith(rb"a cat \U0001f431")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generate"], 2, "required: prompt"),
        (["nothing"], 2, "invalid choice"),
        (["cache", "clear"], 2, "unrecognized arguments: clear; see pocketdiffusion cache --help"),
        (["generate", "a", "--steps", "x"], 2, "invalid int"),
        (["generate", "a", "--steps", "0"], 2, "from 1 to 1000"),
        (["generate", "a", "--guidance-interval", "3"], 2, "A:B"),
        (["generate", "a", "-o", "a.gif"], 2, "webp"),
        (["generate", "a", "-o", "{prompt}.png"], 2, "{seed}"),
        (["generate", "a", "-o", "absent/a.png"], 2, "no folder absent"),
        (["generate", "a", "--quality", "0"], 2, "quality is 0; it must be from 1 to 100"),
        (["generate", "a", "--strength", "0.5"], 2, "strength was given without image"),
        (["generate", "a", "--sampler", "none"], 2, "euler"),
        (["generate", "a", "--preset", "none"], 2, "exact, balanced, fast"),
        (["generate", "a", "--computed-steps", "2"], 2, "from 3 to 1000"),
        (["generate", "a", "--image", "missing.png"], 2, "missing.png"),
        (["inspect", "no-such-model"], 1, "no-such-model"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(words)
    except SystemExit as stop:  # argparse's way out
        found = int(str(stop.code))
    output = capsys.readouterr()
    assert (found, output.out) == (code, "")
    assert message in output.err and output.err.count("\n") == 1
    assert not [path for path in Path().iterdir() if path.is_file()]


def test_interruption_ends_with_130_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "stream", interrupt)
    assert cli.main(["generate", "a cat"]) == 130
    assert capsys.readouterr().err == "pocketdiffusion: interrupted\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise NonFinite("unet", "out_sample", precision="float16", device="x", bad=1, size=2)

    monkeypatch.setattr(Pipeline, "stream", fail)
    assert cli.main(["generate", "a cat"]) == 1
    with pytest.raises(NonFinite):
        cli.main(["generate", "a cat", "--debug"])


def test_every_command_has_help_and_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND.name in cli.COMMANDS
    for words in (["--help"], *([name, "--help"] for name in cli.COMMANDS), ["--version"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
    assert capsys.readouterr().out.count("usage: pocketdiffusion") == 1 + len(cli.COMMANDS)
