"""Peers: what they refuse, their environments, their command, and the runners' protocol. No network, no torch."""

from __future__ import annotations

import ast
import itertools
import json
import py_compile
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketdiffusion.bundle import Bundle
from pocketdiffusion.noise.mersenne import MersenneTwister
from pocketdiffusion_bench import peers
from pocketdiffusion_bench.case import Case
from pocketdiffusion_bench.checks import mismatch
from pocketdiffusion_bench.errors import BenchError
from pocketdiffusion_bench.events import START, read_events
from pocketdiffusion_bench.peers import PEERS, Peer, PeerUnavailable, base, venv
from pocketdiffusion_bench.peers.runners.protocol import normal
from pocketdiffusion_bench.peers.venv import Environment, reason

SETTINGS = {"model": "the model", "colour": 7}
RUNNER = """
import sys
sys.path.insert(0, {folder!r})
from protocol import finish, start

class Picture:
    def save(self, file):
        file.write_text("pixels")

job = start()
job.events.enter("load")

def picture():
    job.events.enter("text_encode")
    for _ in range(job.case["steps"]):
        job.events.enter("step")
    job.events.enter("vae_decode")
    return Picture()

job.draw(picture)
used = {{name: job.case[name] for name in ("width", "height", "steps", "guidance", "threads")}}
finish(job, {{"device": "cpu", "precision": "float32", **job.settings, **used}})
"""


def prepared(peer: Peer, case: Case) -> Mapping[str, Any]:
    return SETTINGS


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer whose environment is this Python."""
    folder = tmp_path / "runners"
    folder.mkdir()
    (folder / "run_fake.py").write_text(RUNNER.format(folder=str(base.RUNNERS)))
    monkeypatch.setattr(base, "RUNNERS", folder)
    environment = Environment("fake", (("nothing",),))
    environment.interpreter.parent.mkdir(parents=True)
    environment.interpreter.symlink_to(sys.executable)
    (environment.folder / venv.READY).write_text("{}")
    made = Peer("fake", "a fake", environment, "run_fake.py", ("cpu",), ("float32",), ("fp32",), {}, prepared)
    monkeypatch.setitem(PEERS, "fake", made)
    return made


def test_a_runner_tells_its_whole_time(peer: Peer, tiny_bundle: Bundle, tmp_path: Path) -> None:
    case = Case(str(tiny_bundle.path), "fake", steps=3, threads=2)
    peers.require(case)
    events, image = tmp_path / "events.jsonl", tmp_path / "picture.png"
    command = peers.command(case, events=events, image=image, images=2)
    begin = time.perf_counter()
    subprocess.run(command, check=True, env={START: repr(begin)}, timeout=60)
    found = read_events(events)
    assert found.done and found.done_at is not None and found.begun == []
    assert [path.name for path in found.pictures] == ["picture-0.png", "picture-1.png"]
    assert all(path.read_text() == "pixels" for path in found.pictures)
    one = ["text_encode", "step", "step", "step", "vae_decode", "save"]
    stages = [span for span in found.spans if span.name != "image"]
    assert [span.name for span in stages] == ["python", "import", "load", *one, *one]
    assert stages[0].start == begin and all(span.end >= span.start for span in stages)
    cold = stages[:9]
    assert all(left.end == right.start for left, right in itertools.pairwise(cold))
    assert [span.name for span in found.spans].count("image") == 2


def test_a_runner_gets_what_the_case_leaves_open(peer: Peer, tiny_bundle: Bundle, tmp_path: Path) -> None:
    case = Case(str(tiny_bundle.path), "fake", precision="float32", device="cpu", recipe="fp32")
    events = tmp_path / "events.jsonl"
    subprocess.run(peer.command(case, events=events, image=tmp_path / "p.png", images=1), check=True, timeout=60)
    used, numbers = read_events(events).configuration, tiny_bundle.manifest.numbers
    assert (used["width"], used["height"], used["steps"]) == (numbers.width, numbers.height, numbers.default_steps)
    assert used["colour"] == 7 and mismatch(case, used) is None
    assert mismatch(case, {**used, "precision": "bfloat16"}) == "the model ran in bfloat16, asked for float32"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "cuda"}, "diffusers has no device 'cuda'; it has: cpu"),
        ({"precision": "float16"}, "diffusers has no precision 'float16'; it has: float32, bfloat16"),
        ({"recipe": "int8"}, "diffusers has no recipe 'int8'; it has: fp32"),
        ({"vae_tile": 256}, "diffusers has no vae_tile '256'; that is pocketdiffusion's own setting"),
        ({"preset": "fast"}, "diffusers has no preset 'fast'; that is pocketdiffusion's own setting"),
        ({"decoder": "tiny"}, "diffusers has no decoder 'tiny'; that is pocketdiffusion's own setting"),
        ({"memory_plan": 10**9}, "diffusers has no memory_plan '1000000000'; that is pocketdiffusion's own setting"),
        ({"residency": "keep"}, "diffusers has no residency 'keep'; that is pocketdiffusion's own setting"),
        ({"sampler": "dpm++ 3m sde"}, "diffusers has no sampler 'dpm++ 3m sde'; it has: ddim"),
        ({"sampler": "Euler Karras"}, "diffusers has no sampler 'Euler Karras'; it has: ddim"),
        ({"sampler": "nonsense"}, "unknown sampler 'nonsense'"),
    ],
)
def test_what_a_peer_can_not_do_is_refused_in_one_line(asked: Mapping[str, Any], said: str) -> None:
    with pytest.raises(BenchError) as refused:
        peers.require(Case("random:sd15", "diffusers", **asked))
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_samplers_get_the_peers_own_names() -> None:
    case = Case("random:sd15", sampler="DPM++ 2M")
    assert PEERS["diffusers"].sampler(case) == "DPMSolverMultistepScheduler"
    assert PEERS["stable-diffusion-cpp"].sampler(case) == "dpm++2m"
    assert PEERS["diffusers"].sampler(Case("random:sd15", sampler="euler")) == "EulerDiscreteScheduler"
    assert PEERS["openvino-genai"].sampler(Case("random:sd15", sampler="PNDMScheduler")) == "PNDM"
    assert PEERS["diffusers"].sampler(Case("random:sd15")) is None


def test_defaults_are_the_peers_first_choices() -> None:
    case = Case("random:sd15")
    assert PEERS["diffusers"].precision(case) == "float32"
    assert PEERS["diffusers-best"].precision(case) == "bfloat16"
    assert PEERS["stable-diffusion-cpp"].precision(case) is None
    with pytest.raises(BenchError, match="no precision 'float32'; it has: its own only"):
        PEERS["stable-diffusion-cpp"].check(Case("random:sd15", precision="float32"))


def test_a_bundle_is_read_by_peers_that_know_its_graphs(tiny_bundle: Bundle) -> None:
    case = Case(str(tiny_bundle.path))
    found = PEERS["optimum-onnx"].bundle(case, "fake")
    assert found == {"model": str(tiny_bundle.path), "graphs": "pocketdiffusion bundle", "recipe": "fp32"}
    with pytest.raises(BenchError, match="optimum-onnx reads onnx graphs; .* holds fake"):
        PEERS["optimum-onnx"].bundle(case, "onnx")
    with pytest.raises(BenchError, match="stored as fp32, asked for int8"):
        PEERS["optimum-onnx"].bundle(Case(str(tiny_bundle.path), recipe="int8"), "fake")


def test_an_unknown_peer_is_named_with_the_choices() -> None:
    with pytest.raises(BenchError, match="no peer 'comfy'; choose from: pocketdiffusion, diffusers, "):
        peers.require(Case("sticker", "comfy"))


def test_an_environment_is_only_made_on_request() -> None:
    with pytest.raises(PeerUnavailable, match="diffusers is not set up here; run the command with --set-up-peers"):
        peers.require(Case("random:sd15", "diffusers"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that only notes what it is asked for, in the environment that it runs in."""
    note = "import pathlib, sys; open(pathlib.Path(sys.prefix) / 'asked', 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    monkeypatch.setattr(venv, "VENV", ("-m", "venv", "--without-pip"))
    monkeypatch.setattr(venv, "PIP", ("-c", note))


@pytest.mark.usefixtures("no_network")
def test_an_environment_is_set_up_once_and_in_order() -> None:
    said: list[str] = []
    environment = Environment("some", (("first==1",), ("second==2", "third")))
    environment.set_up(said.append)
    assert (environment.folder / "asked").read_text() == "first==1\nsecond==2 third\n"
    prefix = subprocess.run(
        [environment.python(), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    )
    assert Path(prefix.stdout.strip()).resolve() == environment.folder.resolve()
    environment.set_up(said.append)
    assert len(said) == 3
    assert Environment("some", (("first==2",),)).folder != environment.folder


@pytest.mark.usefixtures("no_network")
def test_an_environment_that_was_interrupted_is_made_anew() -> None:
    environment = Environment("some", (("first==1",),))
    environment.folder.mkdir(parents=True)
    (environment.folder / "half").touch()
    with pytest.raises(PeerUnavailable):
        environment.python()
    environment.set_up(lambda line: None)
    assert environment.python().exists() and not (environment.folder / "half").exists()


@pytest.mark.usefixtures("no_network")
def test_what_can_not_be_installed_is_reported_with_pips_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv, "PIP", ("-c", "print('ERROR: no such version'); raise SystemExit(1)"))
    failed = peers.set_up(["openvino-genai"], lambda line: None)
    assert failed == {"openvino-genai": "openvino-genai can't be installed: ERROR: no such version"}
    assert not PEERS["openvino-genai"].environment.folder.exists()


def test_pips_reason() -> None:
    assert reason("Collecting x\nERROR: first\nERROR: last\nWARNING: old pip\n") == "ERROR: last"
    assert reason("  killed  \n\n") == "killed"
    assert reason("") == "no message"


@pytest.mark.parametrize("file", sorted(base.RUNNERS.glob("*.py")), ids=lambda file: file.name)
def test_runners_compile_and_import_nothing_of_ours(file: Path, tmp_path: Path) -> None:
    py_compile.compile(str(file), str(tmp_path / "compiled"), doraise=True)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):  # what type checkers see does not count
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert not any(str(name).startswith("pocketdiffusion") for name in names)


def test_every_peer_has_its_runner_and_pins() -> None:
    for peer in PEERS.values():
        assert (base.RUNNERS / peer.runner).is_file()
        for environment in (peer.environment, *peer.converters):
            first, *others = environment.installs
            assert "==" in first[0]
            assert not any(name.startswith("torch") for install in others for name in install)
            needs_torch = any(word in str(others) for word in ("diffusers", "optimum"))
            assert not needs_torch or first == ("torch==2.13.0",)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5])
def test_the_runners_noise_is_the_runtimes(seed: int) -> None:
    found = normal(seed, 4 * 8 * 8)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, MersenneTwister(seed).standard_normal(4 * 8 * 8))


def test_settings_reach_stable_diffusion_cpp(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    for part, config in (("unet", {"sample_size": 8}), ("vae", {"block_out_channels": [1, 1]})):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "unet" / "model.safetensors").touch()
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    peer = PEERS["stable-diffusion-cpp"]
    settings = peer.prepare(peer, Case(str(folder), recipe="int8", sampler="euler", steps=4))
    assert (settings["type"], settings["sampler"], len(settings["sigmas"])) == ("q8_0", "euler", 5)
    assert settings["sigmas"][-1] == 0 and settings["sigmas"] == sorted(settings["sigmas"], reverse=True)
    with pytest.raises(BenchError, match="has no sampler 'pndm', which is the model's; ask for one of: euler"):
        peer.prepare(peer, Case(str(folder), steps=4))


def test_a_product_is_cut_to_what_its_peers_have() -> None:
    asked = [
        Case("random:sd15", peer=peer, device=device, recipe=recipe)
        for peer in ("pocketdiffusion", "diffusers")
        for device in ("onnxruntime:cpu", "openvino:cpu")
        for recipe in ("fp32", "int8")
    ]
    said: list[str] = []
    found = peers.offered(asked, said.append)
    assert found == [*asked[:4], Case("random:sd15", peer="diffusers", recipe="fp32")]
    assert len(said) == 2 and all("diffusers has no recipe 'int8'" in line for line in said)
    with pytest.raises(BenchError, match="nothing of what was asked can be measured with diffusers"):
        peers.offered([Case("random:sd15", peer="diffusers", recipe="int8")], said.append)
