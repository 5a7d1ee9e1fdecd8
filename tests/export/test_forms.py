"""The traced form of attention: one node that never holds all scores, equal to Diffusers' own on both engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from pocketdiffusion import backends  # noqa: E402
from pocketdiffusion_export import verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.families.parts import vae_decoder  # noqa: E402
from pocketdiffusion_export.forms import fused_attention  # noqa: E402
from pocketdiffusion_export.targets.onnx import TARGET  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_attention_is_one_node_that_equals_diffusers_own(engine: str, tmp_path: Path) -> None:
    if "cpu" not in backends.load(engine).devices():
        pytest.skip(f"{engine} is not installed")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), layers_per_block=1, norm_num_groups=8).eval()
    spec = vae_decoder(vae)
    model = TARGET.trace(spec)
    kinds = [(node.domain, node.op_type) for node in model.graph.node]
    assert kinds.count(("com.microsoft", "MultiHeadAttention")) == 1
    assert "Softmax" not in {kind for _, kind in kinds}
    TARGET.save(model, tmp_path / "model.onnx")
    feeds = {"latent_sample": np.random.default_rng(0).standard_normal((3, 4, 8, 12)).astype(np.float32)}
    found = verify.open_session(tmp_path / "model.onnx", engine).run(feeds)["sample"]
    assert verify.compare([spec.run_reference(feeds)["sample"]], [found]).sqnr_db > 90


def test_attention_that_the_form_does_not_know_is_refused() -> None:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    own = unet.attn_processors
    rows = torch.zeros(2, 4, 8, 8), torch.tensor(5.0), torch.zeros(2, 6, 16)
    with torch.inference_mode(), fused_attention(unet), pytest.raises(ExportError, match="attention with a mask"):
        unet(*rows, encoder_attention_mask=torch.ones(2, 6))
    assert unet.attn_processors == own
