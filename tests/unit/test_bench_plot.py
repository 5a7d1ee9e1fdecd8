from __future__ import annotations

import sys

import pytest
from PIL import Image

from pocketdiffusion_bench import plot as module
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.plot import plot

from .bench_records import make_failed, make_record, make_run

RECORDS = [make_record(), make_record([make_run([[1.0, 2.0]])], Case("sticker")), make_failed()]


@pytest.fixture
def _matplotlib():
    pytest.importorskip("matplotlib")


@pytest.mark.usefixtures("_matplotlib")
def test_png(tmp_path):
    plot(RECORDS, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("L").getcolors() or [0]) > 10


@pytest.mark.usefixtures("_matplotlib")
def test_svg_is_the_same_for_the_same_records(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot(RECORDS, tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "peak RSS, MB" in text and "sticker" in text and "vae_decode" in text and "onnxstream" not in text


@pytest.mark.usefixtures("_matplotlib")
def test_stages_stand_one_after_the_other():
    import matplotlib.figure

    axes = matplotlib.figure.Figure().subplots()
    module._bars(axes, RECORDS[:1])
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0.0, 0.5), (0.5, 3.0), (3.5, pytest.approx(0.1))]


@pytest.mark.usefixtures("_matplotlib")
def test_a_case_without_a_memory_reading_is_not_in_the_scatter(tmp_path):
    run = make_run([[1.0]])
    unread = type(run)(run.seconds, run.spans, type(run.memory)())
    plot([make_record([unread])], tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("records", "name", "message"),
    [
        (RECORDS, "plot.gif", "its ending is unknown; choose from .png, .svg"),
        (RECORDS[2:], "plot.png", "no case made a picture"),
    ],
)
def test_what_can_not_be_drawn(tmp_path, records, name, message):
    with pytest.raises(BenchError, match=message):
        plot(records, tmp_path / name)


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BenchError, match="--plot needs matplotlib, which is not installed: pip install matplotlib"):
        plot(RECORDS, tmp_path / "plot.png")
