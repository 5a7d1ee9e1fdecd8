"""Where graphs are cut: few parts, few bytes between them, every operation where it belongs."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion_export.cutting import Flow, Op, Piece, cut


def chain(*weights: int, crossing: int = 1) -> Flow:
    """Layers in a row: x -> t0 -> t1 …"""
    names = ["x", *(f"t{index}" for index in range(len(weights)))]
    ops = [Op((names[i], f"w{i}"), (names[i + 1],)) for i in range(len(weights))]
    return Flow(ops, (names[-1],), {f"w{i}": n for i, n in enumerate(weights)}, dict.fromkeys(names, crossing))


def run(flow: Flow, pieces: Sequence[Piece]) -> dict[str, str]:
    """What each output is made of; fails where a part reads what it was not given."""
    known = {"x": "x"}
    for piece in pieces:
        tensors = {name: known[name] for name in piece.inputs} | {name: name for name in flow.weights}
        for index in piece.ops:
            op = flow.ops[index]
            text = f"{index}({','.join(tensors[name] for name in op.inputs)})"
            tensors |= {name: f"{text}.{place}" for place, name in enumerate(op.outputs)}
        known |= {name: tensors[name] for name in piece.outputs}
    return {name: known[name] for name in flow.outputs}


def test_what_fits_is_one_part() -> None:
    (piece,) = cut(chain(3, 3, 3), 9)
    assert (piece.ops, piece.inputs, piece.outputs, piece.weight_bytes) == ((0, 1, 2), ("x",), ("t2",), 9)


def test_as_few_parts_as_the_limit_allows() -> None:
    pieces = cut(chain(3, 3, 3, 3, 3), 6)
    assert [piece.weight_bytes for piece in pieces] in ([3, 6, 6], [6, 3, 6], [6, 6, 3])
    assert [piece.inputs for piece in pieces[1:]] == [piece.outputs for piece in pieces[:-1]]


def test_a_layer_that_is_larger_than_the_limit_stands_alone() -> None:
    assert [piece.weight_bytes for piece in cut(chain(1, 9, 1), 4)] == [1, 9, 1]


def test_the_cut_is_where_the_fewest_bytes_cross() -> None:
    flow = chain(2, 2, 2, 2)
    flow = Flow(flow.ops, flow.outputs, flow.weights, {"x": 1, "t0": 5, "t1": 9, "t2": 2, "t3": 1})
    assert [piece.ops for piece in cut(flow, 6)] == [(0, 1, 2), (3,)]


def test_nothing_is_cut_where_a_tensor_may_not_be_handed_on() -> None:
    flow = chain(2, 2, 2, 2)
    flow = Flow(flow.ops, flow.outputs, flow.weights, {"t0": 1, "t2": 1})
    assert [piece.ops for piece in cut(flow, 2)] == [(0,), (1, 2), (3,)]


def test_a_tensor_for_later_skips_the_parts_between() -> None:
    ops = [Op(("x", "w0"), ("a",)), Op(("a", "w1"), ("b",)), Op(("b", "w2"), ("c",)), Op(("c", "a", "w3"), ("y",))]
    flow = Flow(ops, ("y",), {f"w{i}": 1 for i in range(4)}, dict.fromkeys("abc", 1))
    pieces = cut(flow, 1)
    assert [(piece.inputs, piece.outputs) for piece in pieces] == [
        (("x",), ("a",)),
        (("a",), ("b",)),
        (("b",), ("c",)),
        (("c", "a"), ("y",)),
    ]


def test_repeated_operations_are_in_every_part_that_needs_them() -> None:
    ops = [
        Op(("codes", "scale"), ("weight",)),  # follows from constants
        Op(("x",), ("shape",), repeated=True),
        Op(("x", "weight"), ("a",)),
        Op(("a", "shape", "other"), ("y",)),
    ]
    flow = Flow(ops, ("y",), {"codes": 4, "scale": 1, "other": 4}, {"a": 1, "shape": 1, "weight": 1})
    first, second = cut(flow, 5)
    assert (first.ops, first.inputs, first.outputs, first.weight_bytes) == ((0, 2), ("x",), ("a",), 5)
    assert (second.ops, second.inputs, second.outputs, second.weight_bytes) == ((1, 3), ("x", "a"), ("y",), 4)


def test_an_output_that_is_repeated_is_made_by_the_last_part() -> None:
    ops = [Op(("x", "v"), ("a",)), Op(("a",), ("q",), repeated=True), Op(("a", "w"), ("y",))]
    first, second = cut(Flow(ops, ("q", "y"), {"v": 1, "w": 1}, {"a": 1}), 1)
    assert (first.outputs, second.ops, second.outputs) == (("a",), (1, 2), ("q", "y"))


@st.composite
def flows(draw: st.DrawFn) -> Flow:
    """Graphs of layers, weights that several read, and repeated operations, in an order in which they can run."""
    tensors, ops, weights = ["x"], list[Op](), dict[str, int]()
    for index in range(draw(st.integers(1, 12))):
        repeated = draw(st.booleans())
        inputs = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3, unique=True))
        if not repeated:
            name = draw(st.sampled_from([*weights, f"w{index}"]))
            weights.setdefault(name, draw(st.integers(0, 9)))
            inputs.append(name)
        made = [f"t{index}_{place}" for place in range(draw(st.integers(1, 2)))]
        ops.append(Op(tuple(inputs), tuple(made), repeated))
        tensors += made
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=3, unique=True))
    crossing = {name: draw(st.integers(1, 9)) for name in tensors if draw(st.integers(0, 4))}
    return Flow(ops, tuple(outputs), weights, crossing)


@given(flows(), st.integers(0, 20))
def test_parts_compute_the_whole(flow: Flow, limit: int) -> None:
    pieces = cut(flow, limit)
    whole = Piece(tuple(range(len(flow.ops))), ("x",), flow.outputs, 0)
    assert run(flow, pieces) == run(flow, [whole])
    handed_on = {name for piece in pieces for name in piece.inputs} - {"x"}
    assert handed_on <= flow.crossing.keys()
    once = [index for piece in pieces for index in piece.ops if not flow.ops[index].repeated]
    assert len(once) == len(set(once))
