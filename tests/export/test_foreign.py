"""Folders that other exporters wrote make Diffusers' images, unmodified, on both engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
main_export = pytest.importorskip("optimum.exporters.onnx").main_export
ov = pytest.importorskip("openvino")

import onnx  # noqa: E402

from pocketdiffusion import Pipeline  # noqa: E402
from pocketdiffusion.verify import psnr_db  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ENGINES = ["onnxruntime:cpu", "openvino:cpu"]
GRAPHS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
DB = 50.0


@pytest.fixture(scope="module")
def optimum(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "optimum"
    main_export(str(tiny), folder, task="text-to-image", do_validation=False)
    return folder


@pytest.fixture(scope="module")
def openvino(optimum: Path) -> Path:
    """The layout of `optimum-cli export openvino`, with graphs that openvino itself converted."""
    folder = optimum.parent / "openvino"
    shutil.copytree(optimum, folder, ignore=shutil.ignore_patterns("*.onnx"))
    (folder / "tokenizer" / "openvino_tokenizer.xml").write_text("<net/>", encoding="utf-8")
    for name in GRAPHS:
        model = ov.convert_model(optimum / name / "model.onnx")
        ov.save_model(model, folder / name / "openvino_model.xml", compress_to_fp16=False)
    return folder


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> Any:
    return quiet(diffusers.StableDiffusionPipeline.from_pretrained(str(tiny), safety_checker=None))


@pytest.fixture(scope="module")
def legacy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as Diffusers' old conversion script made it, and the torch pipeline it was made from."""
    folder = tmp_path_factory.mktemp("legacy") / "onnx"
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(str(tiny), safety_checker=None))
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=64, **blocks)
    pipe.register_modules(vae=vae.eval())
    pipe.vae_scale_factor = 8
    pipe.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8)
    write_legacy(folder, pipe, tiny)
    return folder, pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Call(torch.nn.Module):
    """A function of a module as one that can be traced."""

    def __init__(self, module: Any, call: Any) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Any) -> Any:
        return self.call(self.module, *inputs)


def write_legacy(folder: Path, pipe: Any, tiny: Path) -> None:
    latents, picture = torch.zeros(2, 4, 8, 8), torch.zeros(1, 3, 64, 64)
    axes = {0: "batch", 1: "channels", 2: "height", 3: "width"}
    text = {0: "batch", 1: "sequence"}
    for name, module, call, inputs, names, outputs, dynamic in (
        (
            *("text_encoder", pipe.text_encoder, lambda m, ids: m(ids, return_dict=False)),
            *((torch.ones(1, 16, dtype=torch.int32),), ["input_ids"]),
            *(["last_hidden_state", "pooler_output"], {"input_ids": text}),
        ),
        (
            *("unet", pipe.unet, lambda m, x, t, states: m(x, t, states, return_dict=False)[0]),
            *((latents, torch.ones(2, dtype=torch.int64), torch.zeros(2, 16, 32)),),
            *(["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
            {"sample": axes, "timestep": {0: "batch"}, "encoder_hidden_states": text},
        ),
        (
            *("vae_encoder", pipe.vae, lambda m, x: m.encode(x, return_dict=False)[0].mode()),
            *((picture,), ["sample"], ["latent_sample"], {"sample": axes}),
        ),
        (
            *("vae_decoder", pipe.vae, lambda m, x: m.decode(x, return_dict=False)[0]),
            *((latents[:1],), ["latent_sample"], ["sample"], {"latent_sample": axes}),
        ),
    ):
        (folder / name).mkdir(parents=True)
        file = str(folder / name / "model.onnx")
        torch.onnx.export(
            Call(module, call).eval(),
            inputs,
            file,
            input_names=names,
            output_names=outputs,
            dynamic_axes=dynamic,
            opset_version=14,
            dynamo=False,
        )
    unet = onnx.load(str(folder / "unet/model.onnx"))
    unet.graph.input.append(onnx.helper.make_tensor_value_info("return_dict", onnx.TensorProto.BOOL, []))
    onnx.save(unet, str(folder / "unet/model.onnx"), save_as_external_data=True, location="weights.pb")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.onnx").write_bytes(b"not looked at")
    shutil.copytree(tiny / "scheduler", folder / "scheduler")
    shutil.copytree(tiny / "tokenizer", folder / "tokenizer")
    index = {name: ["diffusers", "OnnxRuntimeModel"] for name in (*GRAPHS, "safety_checker")}
    index |= {"_class_name": "OnnxStableDiffusionPipeline", "_diffusers_version": "0.10.0"}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def same(ours: Pipeline, theirs: Any, **fields: Any) -> float:
    common = {"num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "np", **fields}
    expected = theirs("red apple", generator=torch.Generator("cpu").manual_seed(7), **common).images[0]
    found = ours("red apple", seed=7, **common).images[0]
    return psnr_db(np.round(expected * 255), np.round(found * 255))


@pytest.mark.parametrize("engine", ENGINES)
def test_optimum_onnx_makes_the_same_image(optimum: Path, theirs: Any, engine: str) -> None:
    pipe = Pipeline.from_pretrained(optimum, device=engine)
    assert same(pipe, theirs) >= DB
    numbers = pipe.bundle.manifest.numbers
    assert (numbers.width, numbers.vae_factor, numbers.size_multiple, numbers.text_length) == (32, 2, 4, 16)


def test_openvino_makes_the_same_image(openvino: Path, theirs: Any) -> None:
    pipe = Pipeline.from_pretrained(openvino, device="openvino:cpu")
    assert same(pipe, theirs) >= DB
    assert "tokenizer/openvino_tokenizer.xml" not in [entry.path for entry in pipe.bundle.manifest.files]


@pytest.mark.parametrize("engine", ENGINES)
def test_diffusers_legacy_onnx_makes_the_same_image(legacy: tuple[Path, Any], engine: str) -> None:
    folder, theirs = legacy
    pipe = Pipeline.from_pretrained(folder, device=engine)
    assert pipe.bundle.manifest.components["unet"].inputs["timestep"].dtype == "int64"
    assert pipe.bundle.manifest.components["text_encoder"].inputs["input_ids"].dtype == "int32"
    assert "unet/weights.pb" in [entry.path for entry in pipe.bundle.manifest.files]
    assert any("safety_checker" in note for note in pipe.notes)
    assert same(pipe, theirs, height=64, width=64) >= DB


def test_a_latent_that_the_graph_drew_itself_is_used(legacy: tuple[Path, Any]) -> None:
    folder, theirs = legacy
    pipe = Pipeline.from_pretrained(folder, device="onnxruntime:cpu")
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        mode = theirs.vae.encode(torch.from_numpy(picture.transpose(0, 3, 1, 2))).latent_dist.mode().numpy() * 0.18215
    from pocketdiffusion import vae
    from pocketdiffusion.timing import Timings

    encoder, numbers = pipe.components["vae_encoder"], pipe.bundle.manifest.numbers
    found = vae.encode(encoder, picture, numbers, lambda: pytest.fail("noise was asked"), Timings())
    np.testing.assert_allclose(found, mode, atol=1e-5)


def test_optimum_image_to_image_is_the_same(optimum: Path, theirs: Any) -> None:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False))
    assert same(Pipeline.from_pretrained(optimum, device=ENGINES[0]), pipe, image=picture, strength=0.6) >= DB


def test_quantized_variants_of_onnxruntime_are_chosen_by_name(optimum: Path, theirs: Any, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    folder = shutil.copytree(optimum, tmp_path / "variants")
    source, target = folder / "unet/model.onnx", folder / "unet/model_quantized.onnx"
    quantize_dynamic(source, target, op_types_to_quantize=["MatMul"])
    pipe = Pipeline.from_pretrained(folder, device=ENGINES[0], variant="quantized")
    assert pipe.bundle.graph("unet").name == "model_quantized.onnx"
    assert pipe.bundle.graph("vae_decoder").name == "model.onnx"
    plain = Pipeline.from_pretrained(folder, device=ENGINES[0])
    assert plain.bundle.graph("unet").name == "model.onnx"
    assert 20 < same(pipe, theirs) < same(plain, theirs)


def test_a_distilled_scheduler_sets_the_defaults(optimum: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(optimum, tmp_path / "lcm")
    config = folder / "scheduler/scheduler_config.json"
    changed = json.loads(config.read_bytes()) | {"_class_name": "LCMScheduler", "lambda_min_clipped": -float("inf")}
    config.write_text(json.dumps(changed), encoding="utf-8")
    pipe = Pipeline.from_pretrained(folder, device=ENGINES[0])
    numbers = pipe.bundle.manifest.numbers
    assert (numbers.default_steps, numbers.default_guidance) == (4, 1.0)
    assert len(pipe("red apple", seed=1).timings.samples["step"]) == 4
