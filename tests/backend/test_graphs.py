"""The graphs that the other tests use, against onnx's own checker and reference implementation."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")


def test_the_graphs_are_what_onnx_calls_valid(graphs):
    for path in graphs.values():
        onnx.checker.check_model(onnx.load(path), full_check=True)


def test_the_expected_numbers_are_those_of_the_reference_implementation(graphs, quantized, feeds_for_quantized):
    reference = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(graphs["weights"]))
    (found,) = reference.run(None, feeds_for_quantized)
    np.testing.assert_allclose(found, quantized.expected(feeds_for_quantized), rtol=1e-4, atol=1e-5)
