"""`EngineCache`: what is found, what is refused, what is dropped; no engine."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pocketdiffusion.backends import cache as engine_cache
from pocketdiffusion.backends.cache import LIMIT, EngineCache, limit_bytes, processor
from pocketdiffusion.cli import main
from pocketdiffusion.errors import InvalidRequest

KEY = {"identity": "digest unet/model.onnx", "graph": "unet/model.onnx", "engine": "e 1", "device": "cpu"}
FACTS = {"inputs": ["x"], "integer": False}
DATA = bytes(range(256)) * 40
posix = pytest.mark.skipif(sys.platform == "win32", reason="the system has no owners of this kind")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path, limit=10**6)


def bytes_of(data: bytes) -> Callable[[io.BytesIO], object]:
    """Exports them in pieces, as an engine does."""
    pieces = [data[start : start + 9000] for start in range(0, len(data), 9000)]
    return lambda stream: [stream.write(piece) for piece in pieces]


def only(cache: EngineCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is hashed from now on."""
    sizes, digest = list[int](), engine_cache._digest
    monkeypatch.setattr(engine_cache, "_digest", lambda about, data: sizes.append(len(data)) or digest(about, data))
    return sizes


def another_process() -> None:
    """What a process knows by itself is gone."""
    engine_cache._WHOLE.clear()


def test_what_was_stored_is_found_with_its_facts(cache: EngineCache) -> None:
    assert cache.load(KEY) is None
    cache.store(KEY, FACTS, bytes_of(DATA))
    found = cache.load(KEY)
    assert found is not None and (found.facts, bytes(found.data)) == (FACTS, DATA)
    assert [(entry.graph, entry.engine, entry.device) for entry in cache.entries()] == [
        ("unet/model.onnx", "e 1", "cpu")
    ]


def test_an_entry_is_hashed_once_a_process_and_again_when_its_file_changed(
    cache: EngineCache, hashed: list[int]
) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    hashed.clear()
    for _ in range(3):
        assert cache.load(KEY) is not None
    assert hashed == [len(DATA)]
    path = only(cache)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert cache.load(KEY) is None
    assert hashed == [len(DATA)] * 2


def test_an_entry_is_hashed_once_for_all_processes_and_again_when_its_file_changed(
    cache: EngineCache, hashed: list[int]
) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    path, old = only(cache), 10**18
    os.utime(path, ns=(old, old))  # not written just now
    hashed.clear()
    for _ in range(3):
        another_process()
        assert cache.load(KEY) is not None
    assert hashed == [len(DATA)]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    another_process()
    assert cache.load(KEY) is None
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.load(KEY) is not None


def test_what_was_written_just_now_is_not_remembered(cache: EngineCache, hashed: list[int]) -> None:
    """Another write in the same tick of the clock would leave no mark."""
    cache.store(KEY, FACTS, bytes_of(DATA))
    os.utime(only(cache), ns=(2**62, 2**62))
    hashed.clear()
    for _ in range(2):
        another_process()
        assert cache.load(KEY) is not None
    assert hashed == [len(DATA)] * 2


@pytest.mark.parametrize("name", KEY)
def test_another_key_finds_nothing(cache: EngineCache, name: str) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.load({**KEY, name: "other"}) is None
    assert cache.load({**KEY, "settings": {}}) is None


def test_an_entry_under_the_name_of_another_is_refused(cache: EngineCache) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    content, path = only(cache).read_bytes(), only(cache)
    other = {**KEY, "device": "gpu"}
    cache.store(other, FACTS, bytes_of(DATA))
    (target,) = (found for found in cache.folder.iterdir() if found != path)
    target.write_bytes(content)
    assert cache.load(other) is None
    assert cache.load(KEY) is not None


def cut(content: bytes) -> bytes:
    return content[:-1]


def longer(content: bytes) -> bytes:
    return content + b"\0"


def flipped(place: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


DAMAGE = {
    "empty": lambda content: b"",
    "a page of blanks": lambda content: b" " * 5000,
    "other JSON": lambda content: b"[1]".ljust(4096) + content[4096:],
    "deep JSON": lambda content: (b"[" * 4096) + content[4096:],
    "the page alone": lambda content: content[:4096],
    "cut": cut,
    "longer": longer,
    **{f"bit at {place}": flipped(place) for place in (0, 20, 150, 4096, 9000, -1 + 4096 + len(DATA))},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_listed_and_repaired(cache: EngineCache, damage: str) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    path = only(cache)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert cache.load(KEY) is None
    assert len(cache.entries()) == 1
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.load(KEY) is not None


def test_what_was_not_used_for_longest_goes_first(cache: EngineCache) -> None:
    keys = [{**KEY, "graph": str(number)} for number in range(3)]
    for age, key in enumerate(keys):
        cache.store(key, FACTS, bytes_of(DATA))
        os.utime(max(cache.folder.iterdir(), key=lambda path: path.stat().st_mtime), (1000 + age, 1000 + age))
    assert cache.load(keys[0]) is not None  # and so 1 is now the oldest
    EngineCache(cache.folder.parent, limit=3 * (len(DATA) + 4096)).store({**KEY, "graph": "3"}, FACTS, bytes_of(DATA))
    assert sorted(entry.graph for entry in cache.entries()) == ["0", "2", "3"]


def test_more_than_the_limit_is_not_kept_and_drops_nothing(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, limit=len(DATA) + 4096)
    cache.store(KEY, FACTS, bytes_of(DATA))
    cache.store({**KEY, "graph": "large"}, FACTS, bytes_of(DATA + b"0"))
    assert len(list(cache.folder.iterdir())) == 1
    assert [entry.graph for entry in cache.entries()] == ["unet/model.onnx"]


def test_no_limit_is_no_cache(tmp_path: Path, cache: EngineCache) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    off = EngineCache(tmp_path, limit=0)
    off.store({**KEY, "graph": "second"}, FACTS, bytes_of(DATA))
    assert off.load(KEY) is None
    assert len(cache.entries()) == 1


def test_an_engine_may_go_back_to_what_it_wrote(cache: EngineCache) -> None:
    def export(stream: io.BytesIO) -> None:
        stream.write(b"....1234")
        assert (stream.tell(), stream.seek(0), stream.write(b"head")) == (8, 0, 4)
        assert stream.seek(0, os.SEEK_END) == 8 and stream.seek(-2, os.SEEK_CUR) == 6

    cache.store(KEY, FACTS, export)
    found = cache.load(KEY)
    assert found is not None and bytes(found.data) == b"head1234"


def test_a_disk_that_fills_up_meanwhile_is_told_at_the_end() -> None:
    class Full(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise OSError(28, "No space left on device")

    written = engine_cache._Written(Full(), 10**6)
    assert written.write(DATA) == len(DATA)  # an engine is not interrupted
    with pytest.raises(OSError, match="No space left"):
        written.finish(KEY, FACTS)


def test_a_disk_that_is_nearly_full_is_left_alone(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.entries() == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_folder_that_takes_nothing_is_no_error(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pocketdiffusion.backends.cache.replacing", fail)
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.load(KEY) is None


def test_a_file_where_the_folder_should_be_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("")
    cache = EngineCache(tmp_path, limit=10**6)
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.load(KEY) is None and cache.entries() == [] and cache.clear() == 0


@posix
def test_the_folder_is_this_users_alone(cache: EngineCache) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    assert cache.folder.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("which", ["folder", "file"])
def test_what_others_can_write_is_not_opened(cache: EngineCache, which: str) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    target = cache.folder if which == "folder" else only(cache)
    target.chmod(0o777)
    assert cache.load(KEY) is None


@posix
def test_what_belongs_to_another_is_not_opened(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cache.load(KEY) is None


@posix
def test_links_are_not_followed(cache: EngineCache, tmp_path: Path) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    path = only(cache)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.load(KEY) is None


def test_writers_at_once_leave_one_whole_entry(cache: EngineCache) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.store(KEY, FACTS, bytes_of(DATA)), range(24)))
    assert only(cache).suffix == ".engine"
    assert cache.load(KEY) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_an_engine_has_copied_leaves_the_memory(tmp_path: Path) -> None:
    data = bytes(range(256)) * (1 << 15)
    cache = EngineCache(tmp_path, limit=10**8)
    cache.store(KEY, FACTS, bytes_of(data))
    found = cache.load(KEY)
    assert found is not None
    with found.passing():
        assert bytes(found.data) == data
        until = time.monotonic() + 60
        while resident(found.path) and time.monotonic() < until:
            time.sleep(0.01)
        assert resident(found.path) == 0
    assert bytes(found.data) == data


def resident(path: Path) -> int:
    """Kilobytes of a file that this process has mapped and in memory."""
    mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
    return int(mapping.split("Rss:")[1].split()[0])


def test_what_a_killed_writer_left_is_cleared(cache: EngineCache) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    (cache.folder / ".0123.part").write_bytes(b"12345")
    assert cache.clear() == 5 + len(DATA) + 4096
    assert list(cache.folder.iterdir()) == []


def test_contents_outlive_the_file(cache: EngineCache) -> None:
    cache.store(KEY, FACTS, bytes_of(DATA))
    found = cache.load(KEY)
    if sys.platform != "win32":
        cache.drop(KEY)
    assert found is not None and bytes(found.data) == DATA


def test_the_environment_sets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    assert limit_bytes() == 4_096_000_000
    monkeypatch.setenv(LIMIT, "20")
    assert limit_bytes() == 20_000_000
    for wrong in ("", "-1", "2GB", "٣"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(InvalidRequest, match="whole megabytes"):
            limit_bytes()


def test_the_processor_is_described_the_same_each_time() -> None:
    first = processor()
    processor.cache_clear()
    assert first == processor() and len(first.split()) == 3


def test_the_command_lists_and_clears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POCKETDIFFUSION_CACHE", str(tmp_path))
    cache = EngineCache(tmp_path, limit=10**6)
    cache.store(KEY, FACTS, bytes_of(DATA))
    (cache.folder / "x.engine").write_bytes(b"?")
    assert main(["cache"]) == 0
    said = capsys.readouterr()
    assert "unet/model.onnx" in said.out and "damaged" in said.out and str(tmp_path) in said.err
    assert main(["cache", "--clear"]) == 0
    assert "freed" in capsys.readouterr().err
    assert main(["cache", "--json"]) == 0
    assert '"entries": []' in capsys.readouterr().out
