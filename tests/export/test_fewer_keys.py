"""Token downsampling: what the graphs compute, what is said of it, and on which targets it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
onnx = pytest.importorskip("onnx")

from diffusers.models.attention_processor import AttnProcessor2_0  # noqa: E402

from pocketdiffusion.backends.base import SessionOptions  # noqa: E402
from pocketdiffusion.bundle import Bundle  # noqa: E402
from pocketdiffusion.cli import main  # noqa: E402
from pocketdiffusion.pipeline import Pipeline  # noqa: E402
from pocketdiffusion.verify import verify  # noqa: E402
from pocketdiffusion_export.errors import ExportError  # noqa: E402
from pocketdiffusion_export.export import Made, export  # noqa: E402
from pocketdiffusion_export.fewer_keys import fewer_keys  # noqa: E402
from pocketdiffusion_export.plan import make_plan  # noqa: E402

pytestmark = pytest.mark.torch


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tiny: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, ...]:
    """ONNX and IR of any size, each once more in parts."""
    folder = tmp_path_factory.mktemp("keys") / "fp32"
    plan = make_plan(tiny, folder, target="onnx,openvino", preset=preset, downsample_keys=2)
    return export(replace(plan, part_bytes=400_000), quiet).bundles


@pytest.fixture
def unet(tiny: Path) -> Iterator[Any]:
    yield diffusers.UNet2DConditionModel.from_pretrained(str(tiny / "unet"), low_cpu_mem_usage=False).eval()


def answer(unet: Any, side: int = 16) -> Any:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, side, side, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.inference_mode():
        return unet(sample, 500, encoder_hidden_states=text).sample


class Sliced(AttnProcessor2_0):  # type: ignore[misc]
    """The same by Diffusers' own attention, handed the kept tokens as if they were another text."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.width, self.stride = width, stride

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        if encoder_hidden_states is None:
            kept = [
                token
                for token in range(hidden_states.shape[1])
                if token // self.width % self.stride == 0 and token % self.width % self.stride == 0
            ]
            encoder_hidden_states = hidden_states[:, kept]
        return super().__call__(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)


@pytest.mark.parametrize(("stride", "side"), [(2, 16), (3, 16), (2, 10)])
def test_diffusers_with_the_kept_tokens_as_context_gives_the_same(unet: Any, stride: int, side: int) -> None:
    """The tiny UNet has attention at its second level alone: maps of half the side, which 3 does not divide."""
    before = answer(unet, side)
    hooks = fewer_keys(unet, stride)
    found = answer(unet, side)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(answer(unet, side), before, rtol=0, atol=0)
    processors = dict(unet.attn_processors)
    largest = {name: Sliced(side // 2, stride) for name in processors if not name.startswith("mid_block")}
    unet.set_attn_processor({**processors, **largest})
    torch.testing.assert_close(found, answer(unet, side))
    assert float((found - before).abs().max()) > 1e-4


def test_graphs_hold_it_for_every_size_and_in_parts(made: tuple[Made, ...]) -> None:
    for bundle in made:
        checks = verify(Bundle.open(bundle.destination), "cpu", SessionOptions())
        assert all(check.passed for check in checks)
        assert min(item.sqnr_db for item in bundle.measured) > 60  # one input has another size and batch
    onnx_bundle, ir_bundle = (bundle.destination for bundle in made)
    graph = onnx.load(onnx_bundle / "unet/model.onnx", load_external_data=False).graph
    own = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in own}
    steps = [constants.get(node.input[4]) for node in graph.node if node.op_type == "Slice" and len(node.input) == 5]
    assert steps.count([2, 2]) == 3  # keys and values share one; one level down, two up
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 0, "output_type": "np", "width": 48}
    pictures = []
    for bundle, device, residency in (
        (onnx_bundle, "onnxruntime", "keep"),
        (onnx_bundle, "onnxruntime", "stream"),
        (onnx_bundle, "openvino", "stream"),
        (ir_bundle, "openvino", "keep"),
        (ir_bundle, "openvino", "stream"),
    ):
        pipe = Pipeline.from_pretrained(bundle, device=device, residency=residency)  # type: ignore[arg-type]
        pictures.append(pipe("red apple", **options).images)
        pipe.close()
    for picture in pictures[1:]:
        assert np.sqrt(np.square(picture - pictures[0]).mean()) < 1e-3


def test_the_bundle_tells_what_was_changed_and_by_how_much(
    made: tuple[Made, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for bundle in made:
        (change,) = bundle.manifest.changes
        assert bundle.manifest.format_version == 4
        assert "1 key in 4 (arXiv:2402.13573)" in change and change.endswith("dB PSNR from the one without")
        assert change in (bundle.destination / "README.md").read_text(encoding="utf-8")
        image = bundle.manifest.golden_image
        assert image is not None and image.psnr_db is not None and image.psnr_db > 40  # of the changed source
    assert main(["inspect", str(made[0].destination)]) == 0
    assert change in capsys.readouterr().out


def test_rounded_activations_are_no_worse_for_it(tiny: Path, preset: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny, tmp_path / "b", recipe="w8a8", preset=preset, accept_error=True, downsample_keys=2)
    (bundle,) = export(plan, quiet).bundles
    whole = make_plan(tiny, tmp_path / "a", recipe="w8a8", preset=preset, accept_error=True)
    (same,) = export(whole, quiet).bundles
    for found, expected in zip(bundle.measured, same.measured, strict=True):
        assert found.sqnr_db > expected.sqnr_db - 3


@pytest.mark.filterwarnings("ignore")  # coremltools leaves files and folders to the collector
def test_core_ml_takes_it(tiny: Path, preset: Path, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    plan = make_plan(tiny, tmp_path / "b", target="coreml", size="32x32", preset=preset, downsample_keys=2)
    (bundle,) = export(plan, quiet).bundles
    assert min(item.sqnr_db for item in bundle.measured if item.component == "unet") > 60


def test_what_can_not_be_left_out_is_said(unet: Any) -> None:
    with pytest.raises(ExportError, match=r"keys can't be downsampled by 1; choose one of: 2, 3, 4"):
        make_plan("source", "bundle", downsample_keys=1)
    for down, up in (("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")):
        bare = diffusers.UNet2DConditionModel(
            block_out_channels=(32,), down_block_types=(down,), up_block_types=(up,), norm_num_groups=8
        )
        with pytest.raises(ExportError, match="no transformers to leave keys out of"):
            fewer_keys(bare, 2)
    for block in unet.down_blocks[1].attentions[0].transformer_blocks:
        block.only_cross_attention = True
    with pytest.raises(ExportError, match="reads the text alone"):
        fewer_keys(unet, 2)
