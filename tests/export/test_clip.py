"""The text encoder's pooled output and clip skip, for both meanings of the end token's id in configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from pocketdiffusion_export import verify  # noqa: E402
from pocketdiffusion_export.families.clip import text_encoder  # noqa: E402
from pocketdiffusion_export.targets.onnx import TARGET  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("end", "layers", "activation"), [(2, 2, "quick_gelu"), (49, 6, "gelu")])
def test_the_graph_equals_transformers(end: int, layers: int, activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act=activation,
        bos_token_id=48,
        eos_token_id=end,
    )
    model = transformers.CLIPTextModel(config).eval()
    graph = tmp_path / "text_encoder.onnx"
    TARGET.save(TARGET.trace(text_encoder(model)), graph)
    ids = np.array([[48, 5, 6, 7, 49, 49, 49, 49], [48, 49, 49, 49, 49, 49, 49, 49], [48, 9, 8, 7, 6, 5, 4, 49]])
    found = verify.open_session(graph, "onnxruntime").run({"input_ids": ids})
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids), output_hidden_states=True)
        states = [expected.hidden_states[-(skip + 1)] for skip in range(1, min(5, layers))]
        skipped = [model.text_model.final_layer_norm(state) for state in states]
    assert len(found) == 2 + min(4, layers - 1)
    assert verify.compare([expected.last_hidden_state.numpy()], [found["last_hidden_state"]]).sqnr_db > 100
    assert verify.compare([expected.pooler_output.numpy()], [found["pooler_output"]]).sqnr_db > 100
    for skip, state in enumerate(skipped, start=1):
        assert verify.compare([state.numpy()], [found[f"clip_skip_{skip}"]]).sqnr_db > 100
