"""Models on the hub: downloaded from a server that answers as the hub does, checked by hash, refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from pocketdiffusion_export.errors import ExportError
from pocketdiffusion_export.plan import make_plan
from pocketdiffusion_export.sources import hub

COMMIT = "c" * 40
UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = ("text_encoder/model.safetensors", UNET, "vae/diffusion_pytorch_model.safetensors")
UNNEEDED = ("other.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors")
PARTS = {
    "tokenizer": "CLIPTokenizer",
    "text_encoder": "CLIPTextModel",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": "DDIMScheduler",
}


class Server(ThreadingHTTPServer):
    """A hub with one model, "owner/tiny", from a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.altered: dict[str, bytes] = {}
        """File -> what is sent instead, under the hash of the true one."""
        self.cut: dict[str, int] = {}
        """File -> bytes after which the first connection breaks."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def names(self) -> list[str]:
        return [file.relative_to(self.folder).as_posix() for file in sorted(self.folder.rglob("*")) if file.is_file()]

    def fetched(self) -> list[str]:
        """Files whose content was asked for."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return [path.split(f"/resolve/{COMMIT}/")[1] for path in paths]


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, dict(self.headers.items())))
        if "owner/gated" in path:
            self.reply(403 if "/resolve/" in path else 401, {"X-Error-Code": "GatedRepo"})
        elif "owner/tiny" not in path:
            self.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/"):
            revision = path.partition("/revision/")[2] or "main"
            known = revision in ("main", "v1", COMMIT)
            self.reply(200 if known else 404, {} if known else {"X-Error-Code": "RevisionNotFound"}, self.facts())
        else:
            self.file(path.split(f"/resolve/{COMMIT}/")[1])

    def facts(self) -> bytes:
        files = [self.describe(name) for name in self.server.names()]
        return json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode()

    def describe(self, name: str) -> dict[str, Any]:
        content = (self.server.folder / name).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        fact: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith((".safetensors", ".bin")):
            fact["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return fact

    def file(self, name: str) -> None:
        facts = self.describe(name)
        content = self.server.altered.get(name, (self.server.folder / name).read_bytes())
        etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        kept = self.server.cut.pop(name, None) if self.command == "GET" else None
        self.reply(206 if start else 200, headers, content[start:], kept)

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"", kept: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:kept])
        if kept is not None:
            self.close_connection = True


def write_model(folder: Path) -> None:
    """Files as a Diffusers folder has them; the weights are none."""
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for part, kind in PARTS.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": kind}), encoding="utf-8")
        index[part] = ["diffusers", kind]
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2", encoding="utf-8")
    for name in WEIGHTS:
        (folder / name).write_bytes(name.encode() * 5000)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With files that are not needed beside those of `write_model`."""
    write_model(tmp_path / "remote")
    for name in UNNEEDED:
        (tmp_path / "remote" / name).write_bytes(b"\x80\x04.")
    with serving(tmp_path / "remote", monkeypatch) as made:
        yield made


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder.parent / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Server(folder) as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
        Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def download(source: str = "hub:owner/tiny") -> tuple[Path, str]:
    return hub.download(source, lambda line: None)


def refusal(source: str = "hub:owner/tiny") -> str:
    with pytest.raises(ExportError) as found:
        download(source)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_what_is_needed_and_no_pickle_is_fetched(server: Server, revision: str) -> None:
    place, origin = download(f"hub:owner/tiny{revision}")
    assert origin == f"owner/tiny@{COMMIT}"
    needed = [name for name in server.names() if name not in UNNEEDED]
    assert sorted(server.fetched()) == needed
    assert all((place / name).read_bytes() == (server.folder / name).read_bytes() for name in needed)


def test_nothing_is_told_to_the_hub(server: Server) -> None:
    download()
    for _, _, headers in server.asked:
        assert "authorization" not in {key.lower() for key in headers}
        assert headers["user-agent"].startswith("pocketdiffusion/") and "torch" not in headers["user-agent"]


def test_a_token_that_the_user_set_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    download()
    assert {headers["authorization"] for _, _, headers in server.asked} == {"Bearer hf_mine"}


def test_what_is_here_is_not_fetched_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(hub, "TOLD_BYTES", 100_000)
    hub.download("hub:owner/tiny", told.append)
    assert [line.split(",")[0] for line in told] == [f"downloading {name}" for name in WEIGHTS]
    server.asked.clear()
    told.clear()
    hub.download("hub:owner/tiny", told.append)
    assert (server.fetched(), told) == ([], [])


def test_an_interrupted_download_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    server.cut[UNET] = 100_000
    assert "run again when it can be reached, which goes on where this stopped" in refusal()
    download()
    starts = [headers.get("Range") for method, path, headers in server.asked if method == "GET" and path.endswith(UNET)]
    assert starts == [None, "bytes=100000-"]


@pytest.mark.parametrize("name", [UNET, "tokenizer/merges.txt"])
def test_a_damaged_file_is_removed_and_fetched_again(server: Server, name: str) -> None:
    content = (server.folder / name).read_bytes()
    server.altered[name] = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    assert f"{name} has the hash" in refusal()
    server.altered.clear()
    place, _ = download()
    assert (place / name).read_bytes() == content


def test_damage_in_the_cache_is_found(server: Server) -> None:
    place, _ = download()
    blob = (place / UNET).resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    assert f"{UNET} has the hash" in refusal()


def only_pickles(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").rename(folder / "config.json")


def another_class(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("StableDiffusionPipeline", "FluxPipeline"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only_pickles, "text_encoder needs model.safetensors; found only model.bin (pickle, never read)"),
        (no_index, "hub:owner/tiny holds no model_index.json; give another model"),
        (another_class, "FluxPipeline can't be exported"),
    ],
)
def test_what_can_not_be_exported_is_not_fetched(server: Server, change: Any, message: str) -> None:
    change(server.folder)
    assert message in refusal()
    assert set(server.fetched()) <= {"model_index.json"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:owner/absent", "the hub has no owner/absent, or keeps it private"),
        ("hub:owner/gated", "hub:owner/gated is given to those who accepted its terms: do so at http://127.0.0.1"),
        ("hub:owner/tiny@absent", "hub:owner/tiny has no revision 'absent'"),
        ("hub:owner/tiny/other.safetensors", "owner/tiny holds no other.safetensors; its safetensors files: text_enc"),
        ("hub:owner", "'hub:owner' is no model on the hub; give hub:OWNER/NAME"),
        ("hub:owner/../x", "'hub:owner/../x' is no model on the hub"),
    ],
)
def test_what_is_not_there_is_one_line(server: Server, source: str, message: str) -> None:
    assert message in refusal(source)
    assert server.fetched() == []


def test_a_disk_too_small_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    assert "0.0 GB are free at" in refusal()
    assert server.fetched() == ["model_index.json"]


def test_a_hub_out_of_reach_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "can't be downloaded from http://127.0.0.1:9 (ConnectionError)" in refusal()


def test_a_checkpoint_in_a_model(server: Server) -> None:
    for name in ("file.yaml", "file.safetensors"):
        (server.folder / name).write_text(name, encoding="utf-8")
    place, origin = download("hub:owner/tiny/file.safetensors@v1")
    assert origin == f"owner/tiny/file.safetensors@{COMMIT}"
    assert place.read_text(encoding="utf-8") == "file.safetensors" and place.with_suffix(".yaml").is_file()
    assert server.fetched() == ["file.safetensors", "file.yaml"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_bundle_says_where_it_comes_from(
    tiny: Path, tmp_path: Path, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketdiffusion_export.export import export

    shutil.copytree(tiny, tmp_path / "remote")
    with serving(tmp_path / "remote", monkeypatch):
        (made,) = export(make_plan("hub:owner/tiny", tmp_path / "bundle", preset=preset), lambda line: None).bundles
    source = made.manifest.source
    assert (source.name, source.licence) == (f"owner/tiny@{COMMIT}", "NOASSERTION")
    assert source.sha256[UNET] == hashlib.sha256((tiny / UNET).read_bytes()).hexdigest()


@pytest.mark.parametrize(("named", "licence"), [("owner/tiny", "MIT"), ("owner/other", "NOASSERTION")])
def test_a_preset_tells_the_terms_of_the_model_it_names(named: str, licence: str, tmp_path: Path) -> None:
    file = tmp_path / "preset.toml"
    file.write_text(f'[source]\nname = "{named}"\nlicence = "MIT"\n', encoding="utf-8")
    plan = make_plan("hub:owner/tiny@v1", "bundle", preset=file)
    assert (plan.source_name, plan.licence) == ("owner/tiny", licence)


@pytest.mark.torch
def test_the_command_asks_where_the_environment_says(server: Server, tmp_path: Path) -> None:
    given = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pocketdiffusion_export", "hub:owner/absent", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | given)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert done.returncode == 1 and len(lines) == 1 and "the hub has no owner/absent" in lines[0]
    offline = subprocess.run(command, capture_output=True, text=True, env=os.environ | given | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 1 and "HF_HUB_OFFLINE forbids to ask it" in offline.stderr
    assert not (tmp_path / "bundle").exists() and len(server.asked) == 1
