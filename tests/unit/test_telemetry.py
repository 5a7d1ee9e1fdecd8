"""Engine telemetry is off before an engine is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from pocketdiffusion import _telemetry


@pytest.fixture
def fresh(monkeypatch):
    """An environment without the variables, where no engine was imported."""
    for name in _telemetry.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("onnxruntime", "openvino", _telemetry.OPENVINO_SENDER):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_variables_are_set(fresh, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    _telemetry.disable()
    assert {name: os.environ[name] for name in _telemetry.VARIABLES} == dict.fromkeys(_telemetry.VARIABLES, "1")


def test_openvino_s_sender_can_not_be_imported(fresh):
    _telemetry.disable()
    with pytest.raises(ImportError):
        __import__(_telemetry.OPENVINO_SENDER)


@pytest.mark.parametrize(("engine", "sender"), [("onnxruntime", None), ("openvino", _telemetry.OPENVINO_SENDER)])
def test_being_late_is_said_once(fresh, monkeypatch, engine, sender):
    for name in filter(None, (engine, sender)):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.warns(RuntimeWarning, match=f"^{engine} was imported before pocketdiffusion"):
        _telemetry.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _telemetry.disable()


def test_someone_else_may_have_switched_it_off(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setitem(sys.modules, "openvino", types.ModuleType("openvino"))
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    _telemetry.disable()  # a warning would be an error


WATCH = """
import sys
seen = []
def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
    if writes or event.startswith("socket.") or event in ("subprocess.Popen", "os.fork", "os.mkdir"):
        seen.append((event, str(args[0])))
sys.addaudithook(hook)
"""


def run_python(code: str, home: Path) -> str:
    """In a process that never heard of the variables, with a home of its own."""
    runtime = str(Path(_telemetry.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if name not in _telemetry.VARIABLES}
    environment |= {"HOME": str(home), "USERPROFILE": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    program = f"{WATCH}\nsys.path.insert(0, {runtime!r})\n{code}"
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment, timeout=60
    )
    return found.stdout.strip()


def test_importing_the_package_switches_it_off_before_any_engine(tmp_path):
    code = (
        "import os, pocketdiffusion; "
        "print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules, 'openvino' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "1 False False"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_opens_no_socket_and_writes_no_file(engine, tmp_path):
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    code = f"from pocketdiffusion.backends import load; assert load({engine!r}).version(); print(seen)"
    assert run_python(code, tmp_path) == "[]"
    assert list(tmp_path.iterdir()) == []


def test_that_check_can_fail(tmp_path):
    code = "import socket; socket.socket().close(); open('note', 'w').close(); print(seen)"
    found = run_python(f"import os; os.chdir({str(tmp_path)!r}); {code}", tmp_path)
    assert "socket.__new__" in found
    assert "note" in found
