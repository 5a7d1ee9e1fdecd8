"""Bits by measured sensitivity on a small graph with every kind of layer, against brute force where that can be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from pocketdiffusion import backends  # noqa: E402
from pocketdiffusion.backends.base import SessionOptions  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.quant import RECIPES, Recipe, calibrate, mixed  # noqa: E402
from pocketdiffusion_export.quant.bits import options, palettes, restored, stored  # noqa: E402
from pocketdiffusion_export.quant.knapsack import choose  # noqa: E402
from pocketdiffusion_export.quant.sensitivity import Trial, relative_noise  # noqa: E402
from pocketdiffusion_export.quant.weights import replace_weights, weight_axes  # noqa: E402

pytestmark = pytest.mark.torch

ENGINES = [name for name in ("onnxruntime", "openvino") if "cpu" in backends.load(name).devices()]
BASE = Recipe("test", "mixed", 20, 15, method="mixed", min_elements=256, group=16)
PALETTES = replace(BASE, group=0, palette=2)
WEIGHTS = ("table", "w1", "w2", "wg", "wm")


def network() -> onnx.ModelProto:
    """ids [n] -> Gather -> Conv -> Conv -> Gemm -> MatMul -> y [n, 256], of which the last two make a small part."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((50, 256)),
        "w1": rng.standard_normal((32, 16, 3, 3)) / 12,
        "w2": rng.standard_normal((16, 32, 3, 3)) / 17,
        "wg": rng.standard_normal((64, 256)) / 16,
        "wm": 0.02 * rng.standard_normal((64, 256)) / 8,
        "bias": rng.standard_normal(16),
    }
    tensors = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    shapes = {"image": [-1, 16, 4, 4], "flat": [-1, 256]}
    tensors += [onnx.numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in shapes.items()]
    node = onnx.helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["words"]),
        node("Reshape", ["words", "image"], ["x"]),
        node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r"]),
        node("Conv", ["r", "w2", "bias"], ["c2"], pads=[1, 1, 1, 1]),
        node("Reshape", ["c2", "flat"], ["rows"]),
        node("Gemm", ["rows", "wg"], ["g"], transB=1),
        node("MatMul", ["g", "wm"], ["m"]),
        node("Add", ["rows", "m"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "test",
        [value("ids", onnx.TensorProto.INT64, ["n"])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 256])],
        tensors,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"ids": rng.integers(0, 50, 12)} for _ in range(count)]


def run(model: onnx.ModelProto, engine: str, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model)
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return backends.load(engine).open(file, "cpu", SessionOptions()).run(feeds)["y"]


def sqnr(want: np.ndarray, got: np.ndarray) -> float:
    return 10 * float(np.log10(np.square(want).sum() / max(np.square(want - got).sum(), 1e-30)))


def brute_force(
    costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budget: float
) -> tuple[float, list[int] | None]:
    found: tuple[float, list[int] | None] = (float("inf"), None)
    for pick in product(*(range(len(of_one)) for of_one in costs)):
        value = sum(of_one[index] for of_one, index in zip(values, pick, strict=True))
        if sum(of_one[index] for of_one, index in zip(costs, pick, strict=True)) <= budget and value < found[0]:
            found = value, list(pick)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_as_good_as_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = 10 ** rng.uniform(-4, 0, (6, 3))
    costs[:, 0] = 0
    values = rng.uniform(0, 1, (6, 3))
    budget = float(costs.max(1).sum() * rng.uniform(0.1, 0.6))
    pick = choose(costs.tolist(), values.tolist(), budget)
    assert pick is not None and sum(costs[range(6), pick]) <= budget
    assert sum(values[range(6), pick]) == pytest.approx(brute_force(costs.tolist(), values.tolist(), budget)[0])


def test_a_knapsack_may_have_no_answer_and_takes_what_costs_nothing() -> None:
    assert choose([[3.0, 2.0], [1.0]], [[0.0, 1.0], [0.0]], 2.5) is None
    assert choose([[3.0, 2.0], [1.0]], [[0.0, 1.0], [0.0]], 3.1) == [1, 0]
    assert choose([[0.0, 1e-9]], [[5.0, 1.0]], 1e-12) == [0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_form_is_what_engines_compute_with(engine: str, index: int, tmp_path: Path) -> None:
    feeds, model, plain = samples()[0], network(), network()
    axes = weight_axes(model.graph)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    forms = {name: options(arrays[name], axis, 16)[index] for name, axis in axes.items()}
    replace_weights(model.graph, lambda t: stored(t, axes[t.name], forms[t.name]) if t.name in axes else None)
    mixed.raise_opset(model)
    for tensor in plain.graph.initializer:
        if tensor.name in forms:
            back = restored(arrays[tensor.name], axes[tensor.name], forms[tensor.name])
            rounded = back.astype(np.float16) if index == 0 else back
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded.astype(np.float32), tensor.name))
    assert sqnr(run(plain, "onnxruntime", tmp_path, feeds), run(model, engine, tmp_path, feeds)) > 100
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    added = sum(size for name, size in sizes.items() if name not in {"bias", "image", "flat"})
    assert added == sum(option.size for option in forms.values())


def test_overwritten_weights_are_those_that_a_trial_runs_with(tmp_path: Path) -> None:
    feeds, model = samples()[0], network()
    trial = Trial(model, WEIGHTS)
    want = trial.outputs([feeds])
    assert sqnr(run(model, "onnxruntime", tmp_path, feeds), want[0][0]) > 60
    trial.put("w1", np.zeros((32, 16, 3, 3), np.float32))
    zeroed = trial.outputs([feeds])
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "w1"]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((32, 16, 3, 3), np.float32), "w1"))
    assert sqnr(run(model, "onnxruntime", tmp_path, feeds), zeroed[0][0]) > 60
    assert relative_noise(want, want) == 0 < relative_noise(want, zeroed)
    assert relative_noise([[np.ones(4), np.ones(4)]], [[np.ones(4), np.zeros(4)]]) == 1  # the worst output


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("target", [24.0, 30.0, 40.0])
def test_the_target_is_met_and_costs_bits(engine: str, target: float, tmp_path: Path) -> None:
    fresh = samples(9)[-1]
    want = run(network(), engine, tmp_path, fresh)
    model = network()
    report = mixed.quantize(model, replace(BASE, target_sqnr_db=target), samples())
    looser = mixed.quantize(network(), replace(BASE, target_sqnr_db=target - 4), samples())
    assert report.notes["sqnr_db_measured"] >= target
    assert report.notes["bits_per_weight"] >= looser.notes["bits_per_weight"]
    assert sqnr(want, run(model, engine, tmp_path, fresh)) > target - 1.5
    assert report.bits.keys() == report.sensitivity.keys() == set(WEIGHTS) and not report.kept_float


def test_the_average_of_bits_is_kept_at_nearly_the_least_error(tmp_path: Path) -> None:
    """Against every choice that is as small, each measured."""
    model, held = network(), samples()
    report = mixed.quantize(model, replace(BASE, bits=6.5), held)
    assert report.notes["bits_per_weight"] <= 6.5 and set(report.bits.values()) >= {4, 8}
    plain, axes = network(), weight_axes(network().graph)
    trial = Trial(plain, axes)
    forms = {name: options(trial.weight(name), axis, 16) for name, axis in axes.items()}
    budget = 6.5 / 8 * sum(trial.weight(name).size for name in axes)
    want, least = trial.outputs(held), float("inf")
    for pick in product(*forms.values()):
        if sum(option.size for option in pick) <= budget:
            for (name, axis), option in zip(axes.items(), pick, strict=True):
                trial.put(name, restored(trial.weight(name), axis, option))
            least = min(least, relative_noise(want, trial.outputs(held)))
    got = [[run(model, "onnxruntime", tmp_path, feeds)] for feeds in held]
    assert relative_noise(want, got) < 1.2 * least


def test_a_layer_that_matters_little_gets_the_fewest_bits() -> None:
    report = mixed.quantize(network(), replace(BASE, target_sqnr_db=35), samples())
    assert report.bits["wm"] == report.bits["wg"] == 4 and report.bits["w2"] >= 8
    assert report.sensitivity["wm"] > report.sensitivity["w2"] + 20


def test_a_large_component_is_measured_in_groups_and_in_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "MAX_TRIAL_WORK", 0)
    monkeypatch.setattr(mixed, "GROUPS", 2)
    runs = []
    outputs = Trial.outputs
    monkeypatch.setattr(Trial, "outputs", lambda self, some: runs.extend(some) or outputs(self, some))
    report = mixed.quantize(network(), replace(BASE, target_sqnr_db=30), samples())
    assert report.notes["sqnr_db_measured"] >= 30 and len(set(report.sensitivity.values())) == 2
    assert len(runs) <= 1 + 2 + 2 + 2 * mixed.CORRECTIONS


def test_an_impossible_target_leaves_float16_and_the_opset() -> None:
    model = network()
    report = mixed.quantize(model, replace(BASE, target_sqnr_db=300), samples())
    assert set(report.bits.values()) == {16} and not report.quantized
    assert model.opset_import[0].version == 17


def test_one_sample_is_enough_and_none_is_not() -> None:
    assert mixed.quantize(network(), replace(BASE, target_sqnr_db=30), samples(1)).notes["sqnr_db_measured"] >= 30
    with pytest.raises(ExportError, match="got no samples"):
        mixed.quantize(network(), replace(BASE, target_sqnr_db=30), [])


def test_an_average_that_can_not_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "LITTLE", 0)
    with pytest.raises(ExportError, match=r"4 bits a weight, the smallest forms of these weights take 5\.\d\d"):
        mixed.quantize(network(), replace(BASE, bits=4), samples())


def test_a_little_component_takes_its_smallest_forms_instead() -> None:
    report = mixed.quantize(network(), replace(BASE, bits=4), samples())
    assert set(report.bits.values()) <= {4, 8} and 4 in report.bits.values()


def test_small_and_huge_weights_are_not_touched() -> None:
    model = network()
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "w1"]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((32, 16, 3, 3), 7e4, np.float32), "w1"))
    report = mixed.quantize(network(), replace(BASE, min_elements=5000, bits=6), samples())
    assert report.kept_float == {"w2": "4608 elements, fewer than 5000", "w1": "4608 elements, fewer than 5000"}
    report = mixed.quantize(model, replace(BASE, bits=6), samples())
    assert report.kept_float == {"w1": "holds values beyond float16"}
    assert {"w1", "w2_int8"} - {tensor.name for tensor in model.graph.initializer} == set()
    none = mixed.quantize(network(), replace(BASE, min_elements=10**6, bits=6), samples())
    assert not none.bits and len(none.kept_float) == len(WEIGHTS)


@pytest.mark.parametrize("index", range(5))
def test_each_size_of_palette_is_what_onnxruntime_computes_with(index: int, tmp_path: Path) -> None:
    model, plain = network(), network()
    axes = weight_axes(model.graph)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    forms = {name: palettes(arrays[name], 2)[index] for name in axes}
    assert {option.bits for option in forms.values()} == {(16, 8, 6, 4, 2)[index]}
    replace_weights(model.graph, lambda t: stored(t, axes[t.name], forms[t.name]) if t.name in axes else None)
    for tensor in plain.graph.initializer:
        if tensor.name in forms:
            back = restored(arrays[tensor.name], axes[tensor.name], forms[tensor.name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(back.astype(np.float16).astype(np.float32), tensor.name))
    feeds = samples()[0]
    found, want = (run(graph, "onnxruntime", tmp_path, feeds) for graph in (model, plain))
    assert sqnr(want, found) > 100


@pytest.mark.parametrize("target", [20.0, 30.0])
def test_palettes_meet_the_target_with_fewer_bits_than_one_size_of_them(target: float, tmp_path: Path) -> None:
    model, fresh = network(), samples(9)[-1]
    report = mixed.quantize(model, replace(PALETTES, target_sqnr_db=target), samples())
    assert report.notes["sqnr_db_measured"] >= target
    want, found = (run(graph, "onnxruntime", tmp_path, fresh) for graph in (network(), model))
    assert sqnr(want, found) > target - 1.5
    assert report.bits["table"] == 16 and len(set(report.bits.values())) > 2  # embeddings have no palettes
    equal = network()
    sizes = {name: 4 if target == 20 else 6 for name in WEIGHTS if name != "table"}
    trial = Trial(equal, WEIGHTS)
    for name, bits in sizes.items():
        (option,) = [option for option in palettes(trial.weight(name), 2) if option.bits == bits]
        trial.put(name, restored(trial.weight(name), 0, option))
    noise = relative_noise([[want]], trial.outputs([fresh]))
    assert -10 * np.log10(noise) < target or sum(report.bits[name] for name in sizes) < sum(sizes.values())


def test_palettes_need_no_newer_opset() -> None:
    model = network()
    mixed.quantize(model, replace(PALETTES, target_sqnr_db=12), samples())
    assert model.opset_import[0].version == 17


def test_its_recipes_have_one_budget_each() -> None:
    found = [recipe for recipe in RECIPES.values() if recipe.method == "mixed"]
    assert len(found) >= 2 and all(bool(recipe.bits) != bool(recipe.target_sqnr_db) for recipe in found)
    assert all(bool(recipe.group) != bool(recipe.palette) for recipe in found)
