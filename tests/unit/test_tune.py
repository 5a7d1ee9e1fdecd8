"""Choosing engines by measured figures, and remembering the choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketdiffusion import cli
from pocketdiffusion.backends import Choice, parse_precisions
from pocketdiffusion.bundle import Bundle
from pocketdiffusion.bundle.models import find_bundle
from pocketdiffusion.errors import BundleUnsupported, GraphFailed, InvalidRequest
from pocketdiffusion.tuning import tune as module
from pocketdiffusion.tuning.choice import Candidate, Measured, best, wanted_db
from pocketdiffusion.tuning.footprint import Footprint, Memory, Subject
from pocketdiffusion.tuning.store import Store
from pocketdiffusion.tuning.tune import Tuning, remembered, tune, tuned_choices

ORT = Candidate("onnxruntime", "cpu", "float32", "fast")
COMPACT = Candidate("onnxruntime", "cpu", "float32", "compact")
OPENVINO = Candidate("openvino", "cpu", "float32", "fast")
BFLOAT16 = Candidate("openvino", "cpu", "bfloat16", "fast")
GPU = Candidate("openvino", "gpu", "float32", "fast")


def footprint(
    run: float, *, opening: float = 0.0, loading: float = 0.0, sqnr_db: float | None = 50.0, kept: str | None = None
) -> Footprint:
    return Footprint(loading, opening, run, run, "float32", Memory(9, 8, 7, 6, 5, 4), sqnr_db, kept)


def measured(component: str, candidate: Candidate, seconds: float, *, loading: float = 0.0) -> Measured:
    return Measured(component, candidate, 1, footprint(seconds, loading=loading))


def test_the_fastest_is_chosen_for_each_component() -> None:
    found = [measured(name, each, time) for name, each, time in (("a", ORT, 2), ("a", GPU, 1), ("b", ORT, 1))]
    chosen = best([*found, measured("b", GPU, 3)])
    assert chosen is not None
    assert {name: item.candidate for name, item in chosen.items()} == {"a": GPU, "b": ORT}


def test_a_slower_accelerator_is_not_chosen() -> None:
    chosen = best([measured("unet", GPU, 2.0), measured("unet", ORT, 1.0)])
    assert chosen is not None and chosen["unet"].candidate == ORT


def test_a_second_engine_must_be_worth_its_import() -> None:
    slow, fast = (
        [
            measured("a", ORT, 1),
            measured("a", OPENVINO, 3),
            measured("b", ORT, 2),
            measured("b", OPENVINO, 1, loading=t),
        ]
        for t in (2.0, 0.5)
    )
    assert {item.candidate for item in (best(slow) or {}).values()} == {ORT}
    assert {item.candidate for item in (best(fast) or {}).values()} == {ORT, OPENVINO}


def test_what_is_as_fast_within_noise_stays_with_the_usual_order() -> None:
    chosen = best([measured("unet", OPENVINO, 0.98), measured("unet", ORT, 1.0), measured("unet", COMPACT, 0.99)])
    assert chosen is not None and chosen["unet"].candidate == ORT


def test_a_component_that_nothing_runs_leaves_no_choice() -> None:
    failed = Measured("b", ORT, 1, None, "it broke")
    assert failed.refused == "it broke" and best([measured("a", ORT, 1), failed]) is None


def test_opening_and_all_runs_count() -> None:
    item = Measured("unet", ORT, 10, Footprint(9.0, 2.0, 1.5, 1.0, "float32", None))
    assert item.seconds == 2.0 + 1.5 + 9 * 1.0


@pytest.mark.parametrize(
    ("exact", "minimum", "max_loss", "wanted"),
    [
        ([43.0, 44.0], 25.0, 1.0, 43.0),
        ([120.0], 25.0, 1.0, 59.0),  # no one sees more than 60 dB
        ([30.0], 35.0, 10.0, 35.0),
        ([None], 35.0, 1.0, float("-inf")),
    ],
)
def test_the_bound_of_the_error(exact: list[float | None], minimum: float, max_loss: float, wanted: float) -> None:
    assert wanted_db([footprint(1, sqnr_db=each) for each in exact], minimum, max_loss) == wanted
    item = Measured("unet", BFLOAT16, 1, footprint(1, sqnr_db=wanted - 0.1), wanted_db=wanted)
    assert (item.refused is None) == (wanted == float("-inf"))


def fake_measure(subject: Subject, *, golden: Path) -> Footprint:
    """bfloat16 is the fastest, and too far off but for the VAE; one candidate fails."""
    assert golden.name.endswith(".safetensors")
    if subject.options.weights == "compact":
        raise GraphFailed("no compact weights today")
    if subject.options.precision == "bfloat16":
        return footprint(0.1, sqnr_db=49.5 if subject.component.startswith("vae") else 40.0)
    return footprint(1.1 if subject.backend == "onnxruntime" else 0.5)


@pytest.fixture
def sticker(monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(module, "candidates", lambda bundle, name: [ORT, COMPACT, OPENVINO, BFLOAT16])
    return Bundle.open(find_bundle("sticker"))


def size(bundle: Bundle, *cells: int) -> tuple[int, ...]:
    """Pixels of that many cells of the latents."""
    return tuple(count * bundle.manifest.numbers.vae_factor for count in cells)


def test_tune_measures_in_turns_and_remembers(sticker: Bundle) -> None:
    said: list[str] = []
    tuning = tune(sticker, threads=1, say=said.append, measure=fake_measure)
    unet = [line for line in said if line.startswith("measuring unet")]
    # what was slow, or failed, goes once
    order = ["onnxruntime", "compact", "openvino", "bfloat16", "openvino", "bfloat16"]
    assert len(unet) == 6 and all(key in line for key, line in zip(order, unet, strict=True))
    assert "2x4x16x16" in unet[0]  # a guided step of the native size
    chosen = tuning.choose()
    assert chosen is not None
    assert {name: item.candidate for name, item in chosen.items()} == {
        "judge_image": OPENVINO,
        "judge_text": OPENVINO,
        "text_encoder": OPENVINO,
        "tiny_vae_decoder": OPENVINO,
        "unet": OPENVINO,
        "vae_decoder": BFLOAT16,
        "vae_encoder": BFLOAT16,
    }
    assert remembered(sticker, threads=1) == tuning
    assert remembered(sticker, threads=2) is None
    assert remembered(sticker, threads=1, size=size(sticker, 32, 32)) is None


def test_a_larger_loss_allows_more(sticker: Bundle) -> None:
    chosen = tune(sticker, max_loss=10.0, rounds=1, measure=fake_measure).choose()
    assert chosen is not None and chosen["unet"].candidate == BFLOAT16


def automatic(bundle: Bundle, device: str = "auto", **given: Any) -> dict[str, Choice]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    fields = {"size": None, "threads": None, "precisions": None, "weights": None, **given}
    return tuned_choices(bundle, device, **fields)


def test_auto_takes_what_was_found(sticker: Bundle) -> None:
    assert {choice.precision for choice in automatic(sticker).values()} == {None}
    tune(sticker, measure=fake_measure, rounds=1)
    found = automatic(sticker)
    assert (str(found["unet"]), found["unet"].precision) == ("openvino:cpu", "float32")
    assert found["vae_decoder"].reason == "the fastest by tune, bfloat16"
    assert automatic(sticker, precisions=parse_precisions("vae=float32"))["vae_decoder"].precision == "float32"
    assert automatic(sticker, weights="compact")["unet"].precision is None
    assert automatic(sticker, "denoiser=onnxruntime:cpu,vae=auto")["unet"].precision is None
    assert automatic(sticker, "cpu")["vae_decoder"].precision is None


@pytest.mark.parametrize("given", [3, "64x64", (64,), (64.0, 64)])
def test_sizes_are_two_whole_numbers(sticker: Bundle, given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"give \(width, height\) in pixels"):
        remembered(sticker, size=given)


def test_another_version_of_the_engine_does_not_count(sticker: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(sticker, measure=fake_measure, rounds=1)
    engine = module.load("openvino")
    monkeypatch.setattr(type(engine), "version", lambda self: "0.1")
    assert automatic(sticker)["unet"].precision is None


def test_other_devices_do_not_count(sticker: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(sticker, measure=fake_measure, rounds=1)
    monkeypatch.setattr(type(module.load("openvino")), "devices", lambda self: ["gpu", "cpu"])
    assert remembered(sticker) is None


def test_a_bundle_without_golden_tensors_is_not_tuned(foreign_like: Bundle) -> None:
    with pytest.raises(BundleUnsupported, match="golden"):
        tune(foreign_like, measure=fake_measure)


@pytest.fixture
def foreign_like(sticker: Bundle) -> Bundle:
    from dataclasses import replace

    return replace(sticker, hashed=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"rules": 1}', b'{"rules": 0, "key": {"a": 1}, "value": 3}'])
def test_a_damaged_record_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    store = Store("tuned", tmp_path)
    store.put({"a": 1}, {"b": [2.5]})
    assert store.get({"a": 1}) == {"b": [2.5]} and store.get({"a": 2}) is None
    store.files()[0].write_bytes(content)
    assert store.get({"a": 1}) is None
    store.put({"a": 1}, 4)
    assert store.get({"a": 1}) == 4
    assert store.clear() > 0 and store.files() == [] and store.clear() == 0


def test_a_folder_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "tuned").write_text("a file")
    store = Store("tuned", tmp_path)
    store.put({"a": 1}, 4)
    assert store.get({"a": 1}) is None and store.clear() == 0


def test_a_record_of_other_fields_is_as_good_as_none(sticker: Bundle) -> None:
    tune(sticker, measure=fake_measure, rounds=1)
    (file,) = Store("tuned").files()
    record = json.loads(file.read_text())
    del record["value"]["measured"][0]["footprint"]["run"]
    file.write_text(json.dumps(record))
    assert remembered(sticker) is None


def test_the_command(sticker: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = module.tune
    monkeypatch.setattr(module, "tune", lambda bundle, **given: real(bundle, **given, measure=fake_measure))
    width, height = size(sticker, 32, 16)
    assert cli.main(["tune", "sticker", "--size", f"{width}x{height}", "--rounds", "1"]) == 0
    said = capsys.readouterr()
    row = next(line for line in said.out.splitlines() if line.startswith("unet") and "bfloat16" in line)
    assert "40.0 dB, at least 49.0 are wanted" in row
    assert "no compact weights today" in said.out and "chosen: the shortest way" in said.out
    assert "measuring unet on onnxruntime:cpu, float32, 2x4x16x32" in said.err
    assert remembered(sticker, size=(width, height)) is not None
    assert cli.main(["tune", "sticker", "--json", "--max-loss", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]["unet"]["precision"] == "bfloat16"
    assert cli.main(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == {"footprints": 0, "tuned": 2}
    assert cli.main(["cache", "--clear"]) == 0
    assert remembered(sticker) is None


def test_nothing_good_enough_is_no_choice(
    sticker: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = Tuning((Measured("unet", ORT, 1, footprint(1, sqnr_db=3.0), wanted_db=25.0),), 1.0, (), {})
    monkeypatch.setattr(module, "tune", lambda bundle, **given: tuning)
    assert cli.main(["tune", "sticker"]) == 1
    assert "nothing is chosen" in capsys.readouterr().err
