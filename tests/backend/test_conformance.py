"""What every backend must do, on every device that is here."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pocketdiffusion.backends.base import SessionOptions
from pocketdiffusion.errors import BackendUnavailable, GraphFailed


def expected(feeds):
    return feeds["sample"] * np.float32(0.5) + np.float32(feeds["timestep"])


@pytest.fixture
def session(engine, graphs):
    session = engine.open(graphs["shift"])
    yield session
    session.close()


def test_it_reports_where_and_how_it_runs(session, engine):
    assert session.device == f"{engine.backend.name}:{engine.device}"
    assert session.precision in ("float32", "float16")
    assert engine.device in engine.backend.devices()
    assert engine.backend.version()


def test_specs_are_the_graph_s(session):
    assert {name: (spec.dtype, len(spec.shape)) for name, spec in session.inputs.items()} == {
        "sample": ("float32", 4),
        "timestep": ("int64", 0),
    }
    assert session.inputs["sample"].shape[1] == 4
    assert not any(isinstance(session.inputs["sample"].shape[axis], int) for axis in (0, 2, 3))
    assert list(session.outputs) == ["out"]
    assert session.outputs["out"].dtype == "float32"


def test_run_gives_the_graph_s_answer(session, shift_feeds):
    outputs = session.run(shift_feeds)
    assert list(outputs) == ["out"]
    assert outputs["out"].dtype == np.float32
    np.testing.assert_allclose(outputs["out"], expected(shift_feeds), rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 1, 2), (1, 4, 16, 4)])
def test_free_axes_may_change_between_runs(session, shift_feeds, shape):
    session.run(shift_feeds)
    feeds = {"sample": np.full(shape, 2, np.float32), "timestep": np.array(1)}
    np.testing.assert_array_equal(session.run(feeds)["out"], np.full(shape, 2, np.float32))


def test_outputs_are_the_caller_s_own(session, shift_feeds):
    first = session.run(shift_feeds)["out"]
    before = first.copy()
    second = session.run({**shift_feeds, "timestep": np.array(100)})["out"]
    np.testing.assert_array_equal(first, before)
    second[...] = 0  # writable
    np.testing.assert_array_equal(session.run(shift_feeds)["out"], before)


def test_feeds_are_not_altered(session, shift_feeds):
    before = {name: array.copy() for name, array in shift_feeds.items()}
    for array in shift_feeds.values():
        array.flags.writeable = False
    session.run(shift_feeds)
    for name, array in before.items():
        np.testing.assert_array_equal(shift_feeds[name], array)


def test_arrays_that_are_not_contiguous(session, shift_feeds):
    turned = np.ascontiguousarray(shift_feeds["sample"].transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    outputs = session.run({**shift_feeds, "sample": turned})
    np.testing.assert_allclose(outputs["out"], expected(shift_feeds), rtol=1e-6)


@pytest.mark.parametrize(
    ("sample", "timestep"), [("float16", "int32"), ("float64", "float32"), ("int64", "float16"), ("int32", "int64")]
)
def test_number_types_are_cast_as_the_graph_declares(session, shift_feeds, sample, timestep):
    feeds = {
        "sample": np.round(shift_feeds["sample"]).astype(sample),
        "timestep": shift_feeds["timestep"].astype(timestep),
    }
    np.testing.assert_allclose(session.run(feeds)["out"], expected(feeds), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "'timestep' is missing; expected sample float32"),
        ({"extra": np.zeros(1)}, "'extra' is unknown; expected sample float32"),
        (
            {"sample": np.zeros((1, 3, 8, 8), np.float32)},
            r"'sample' got float32 \[1, 3, 8, 8\].*expected float32 \[.*, 4,",
        ),
        ({"sample": np.zeros((4, 8, 8), np.float32)}, r"'sample' got float32 \[4, 8, 8\].*expected float32"),
        ({"timestep": np.zeros(1, np.int64)}, r"'timestep' got int64 \[1\].*expected int64 \[\]"),
        ({"timestep": np.array(499.5)}, "'timestep' got float64.*499.5.*expected int64"),
        ({"timestep": np.array(np.nan)}, "'timestep' got float64.*nan.*expected int64"),
        ({"sample": np.zeros((1, 4, 8, 8), np.uint8)}, "'sample' got uint8.*expected float32"),
        ({"sample": np.full((1, 4, 1, 1), 1e300)}, r"'sample' got float64.*1e\+300.*expected float32"),
    ],
)
def test_wrong_feeds_are_refused_in_one_line(session, shift_feeds, change, message):
    feeds = {name: array for name, array in {**shift_feeds, **change}.items() if array is not None}
    with pytest.raises(GraphFailed, match=f"shift.onnx: input {message}") as caught:
        session.run(feeds)
    assert "\n" not in str(caught.value)
    np.testing.assert_allclose(session.run(shift_feeds)["out"], expected(shift_feeds), rtol=1e-6)


def test_a_device_that_is_not_here(engine, graphs):
    with pytest.raises(
        BackendUnavailable, match=f"abacus is not here; present: .*{engine.backend.name}:{engine.device}"
    ):
        engine.backend.open(graphs["shift"], "abacus", SessionOptions())


def test_closing_twice_and_running_afterwards(engine, graphs, shift_feeds):
    session = engine.open(graphs["shift"])
    session.close()
    session.close()
    with pytest.raises(GraphFailed, match=r"shift\.onnx: the session is closed"):
        session.run(shift_feeds)


def test_runs_from_several_threads(session, shift_feeds):
    answers: list[bool] = []

    def work(step: int) -> None:
        feeds = {**shift_feeds, "timestep": np.array(step)}
        for _ in range(20):
            answers.append(np.allclose(session.run(feeds)["out"], expected(feeds)))

    threads = [threading.Thread(target=work, args=(step,)) for step in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 60


@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, -1])
def test_a_truncated_graph(real_engine, graphs, tmp_path, kept, capfd):
    content = graphs["weights"].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(GraphFailed, match=r"cut\.onnx could not be opened on .*:") as caught:
        real_engine.open(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_graph(engine, tmp_path):
    with pytest.raises(GraphFailed, match=r"none\.onnx"):
        engine.open(tmp_path / "none.onnx")


def test_an_error_of_the_engine_is_one_line(real_engine, graphs, feeds_for_quantized, capfd):
    session = real_engine.open(graphs["weights"])
    with pytest.raises(GraphFailed, match=r"weights\.onnx failed on ") as caught:
        session.run({**feeds_for_quantized, "ids": np.arange(3)})  # 8 rows to add to
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_int8_weights_give_the_float_answer(real_engine, graphs, quantized, feeds_for_quantized):
    found = real_engine.open(graphs["weights"]).run(feeds_for_quantized)["out"]
    np.testing.assert_allclose(found, quantized.expected(feeds_for_quantized), rtol=1e-4, atol=1e-4)


def test_int8_activations_run(real_engine, graphs, quantized, feeds_for_quantized):
    session = real_engine.open(graphs["qdq"])
    found = session.run(feeds_for_quantized)["out"]
    error = found - quantized.expected(feeds_for_quantized)
    assert 1e-3 < np.abs(error).max() < 0.5  # steps of 0.04, three times


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads(real_engine, graphs, feeds_for_quantized, quantized, threads):
    session = real_engine.open(graphs["weights"], SessionOptions(threads=threads))
    found = session.run(feeds_for_quantized)["out"]
    np.testing.assert_allclose(found, quantized.expected(feeds_for_quantized), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float8"])
def test_a_precision_is_given_or_refused(real_engine, graphs, precision):
    try:
        session = real_engine.open(graphs["weights"], SessionOptions(precision=precision))
    except GraphFailed as error:
        assert precision in str(error)
    else:
        assert session.precision == precision
