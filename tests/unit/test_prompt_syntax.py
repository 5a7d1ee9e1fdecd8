"""The weight notation. Expected values follow A1111's documentation of it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.prompt.syntax import Fragment, parse_weights


def pairs(text: str) -> list[tuple[str, float]]:
    return [(fragment.text, pytest.approx(fragment.weight)) for fragment in parse_weights(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1)]),
        ("plain text", [("plain text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("((twice))", [("twice", 1.21)]),
        ("[less]", [("less", 1 / 1.1)]),
        ("[[(mixed)]]", [("mixed", 1 / 1.1)]),
        ("(word:1.2)", [("word", 1.2)]),
        ("(word: 0.5 )", [("word", 0.5)]),
        ("(word:-.5)", [("word", -0.5)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("(one:2)(two:2)", [("onetwo", 2)]),
        ("(((one)))(two:1.331)", [("onetwo", 1.331)]),
        (r"\(literal\) \[too\] \\", [(r"(literal) [too] " + "\\", 1)]),
        (r"(\(:\):2)", [("(:)", 2)]),
        (r"back\slash", [("backslash", 1)]),
    ],
)
def test_documented_notation(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(open", [("open", 1.1)]),
        ("a [open", [("a ", 1), ("open", 1 / 1.1)]),
        ("shut)]", [("shut)]", 1)]),
        ("no bracket:1.2)", [("no bracket:1.2)", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(a [b:2) c]", [("a ", 2), ("b", 2 / 1.1), (" c", 1 / 1.1)]),
    ],
)
def test_unbalanced_brackets_are_tolerated(text: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(text) == expected


def test_break_starts_a_chunk_also_inside_brackets() -> None:
    assert parse_weights("a BREAK b") == [Fragment("a "), Fragment(" b", starts_chunk=True)]
    assert parse_weights("BREAK b") == [Fragment(""), Fragment(" b", starts_chunk=True)]
    inside = parse_weights("(a BREAK b:2)")
    assert inside == [Fragment("a ", 2.0), Fragment(" b", 2.0, starts_chunk=True)]


def test_break_is_a_word_of_its_own() -> None:
    assert pairs("BREAKFAST break") == [("BREAKFAST break", 1)]


@pytest.mark.parametrize("text", ["(" * 100 + "b", "(a:1001)", "(a:" + "9" * 400 + ")", "((a:0):" + "9" * 400 + ")"])
def test_excessive_weights_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="out of range") as caught:
        parse_weights(text)
    assert caught.value.parameter == "prompt"


@given(st.text(alphabet=r"ab ()[]:.12\-", max_size=12))
def test_every_text_parses_and_keeps_its_letters(text: str) -> None:
    fragments = parse_weights(text)
    joined = "".join(fragment.text for fragment in fragments)
    assert [letter for letter in joined if letter in "ab"] == [letter for letter in text if letter in "ab"]


@given(st.text(alphabet=r"ab()[]:1\ ", max_size=30))
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join("\\" + letter if letter in r"()[]\\" else letter for letter in text)
    assert parse_weights(escaped) == [Fragment(text)]


@pytest.mark.parametrize(
    "text", ["()" * 100_000, ":" * 200_000, "(a:" + "1" * 200_000, "a" + " " * 200_000 + "b", ": " * 100_000]
)
def test_time_is_linear(text: str) -> None:
    start = time.process_time()
    parse_weights(text)
    assert time.process_time() - start < 5  # quadratic would take minutes
