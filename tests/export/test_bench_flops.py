"""FLOPs counted from exported graphs against torch's FlopCounterMode on their source."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("openvino")

from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.tuning.shapes import input_shapes  # noqa: E402
from pocketdiffusion_bench.flops import graph_flops, step_flops  # noqa: E402
from pocketdiffusion_export.export import export  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

WIDTH, HEIGHT, ROWS = 48, 32, 2


def counted(function, *inputs) -> float:
    """For the meta device, where attention is matrix products: torch 2.13 does not count its fused kernel for CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return float(counter.get_total_flops())


def zeros(*shape: int):
    return torch.zeros(shape, device="meta")


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def bundle(request, tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("flops") / request.param
    export(make_plan(tiny, folder, target=request.param, recipe="fp32", preset=preset), lambda line: None)
    return Bundle.open(folder)


def test_the_unets_count_is_torchs(bundle: Bundle, tiny: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").to("meta")
    rows, length, width = input_shapes(bundle, "unet", width=WIDTH, height=HEIGHT, rows=ROWS)["encoder_hidden_states"]
    expected = counted(unet, zeros(rows, 4, HEIGHT // 2, WIDTH // 2), 1, zeros(rows, length, width))
    assert step_flops(bundle, width=WIDTH, height=HEIGHT, guidance=7.5) == pytest.approx(expected, rel=1e-6)


def test_the_vaes_counts_are_torchs(bundle: Bundle, tiny: Path) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(tiny, subfolder="vae").to("meta")
    for name, function, shape in (
        ("vae_decoder", vae.decode, (1, 4, HEIGHT // 2, WIDTH // 2)),
        ("vae_encoder", vae.encode, (1, 3, HEIGHT, WIDTH)),
    ):
        shapes = input_shapes(bundle, name, width=WIDTH, height=HEIGHT, rows=1)
        assert graph_flops(bundle.graph(name), shapes) == pytest.approx(counted(function, zeros(*shape)), rel=1e-6)
