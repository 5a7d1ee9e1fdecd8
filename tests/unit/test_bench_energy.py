from __future__ import annotations

from pathlib import Path

import pytest

from pocketdiffusion_bench import energy
from pocketdiffusion_bench.energy import Meter

RANGE = 262_143_328_850


class Tree:
    """A folder like /sys/class/powercap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def zone(self, number: str, name: str, microjoules: int, limit: int = RANGE) -> None:
        zone = self.folder / f"intel-rapl:{number}"
        zone.mkdir(exist_ok=True)
        for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", limit)):
            (zone / file).write_text(f"{value}\n", encoding="ascii")


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Tree:
    monkeypatch.setattr(energy, "_nvml", list)
    (tmp_path / "intel-rapl").mkdir()
    return Tree(tmp_path)


def test_packages_and_memory_count_and_their_parts_do_not(tree):
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for number, name in zones.items():
        tree.zone(number, name, 1_000_000)
    meter = Meter(tree.folder)
    meter.start()
    for place, (number, name) in enumerate(zones.items()):
        tree.zone(number, name, 1_000_000 + 10**place * 1_000_000)
    assert meter.stop() == (1 + 100 + 1000, "rapl:package-0, rapl:dram, rapl:package-1")


def test_a_counter_that_began_anew(tree):
    tree.zone("0", "package-0", RANGE - 2_000_000)
    meter = Meter(tree.folder)
    meter.start()
    tree.zone("0", "package-0", 3_000_000)
    assert meter.stop() == (5.0, "rapl:package-0")


def test_updates_catch_every_new_beginning(tree):
    tree.zone("0", "package-0", 0, limit=10_000_000)
    meter = Meter(tree.folder)
    meter.start()
    for value in (6_000_000, 2_000_000, 9_000_000, 1_000_000):  # 6 + 6 + 7 + 2
        tree.zone("0", "package-0", value, limit=10_000_000)
        meter.update()
    assert meter.stop()[0] == pytest.approx(21.0)


def test_the_first_start_does_not_count_what_was_before_and_a_second_begins_anew(tree):
    tree.zone("0", "package-0", 5_000_000)
    meter = Meter(tree.folder)
    for _ in range(2):
        meter.start()
        assert meter.stop() == (0.0, "rapl:package-0")


@pytest.mark.parametrize("damage", ["unreadable", "half", "number", "gone"])
def test_what_can_not_be_read_whole_is_no_reading(tree, damage):
    tree.zone("0", "package-0", 0)
    tree.zone("1", "package-1", 0)
    meter = Meter(tree.folder)
    file = tree.folder / "intel-rapl:1" / "energy_uj"
    if damage in ("unreadable", "half"):  # root may read everything, so the file itself goes
        (file if damage == "half" else file.with_name("name")).unlink()
    elif damage == "number":
        file.write_text("many\n", encoding="ascii")
    meter.start()
    if damage == "gone":
        file.unlink()
    assert meter.stop() == (None, None)


def test_no_counters_no_reading(tree, tmp_path):
    for folder in (tree.folder, tmp_path / "absent"):
        meter = Meter(folder)
        meter.start()
        assert meter.stop() == (None, None)


class Driver:
    """NVML with two GPUs that have used 1000 and 2000 mJ, and 500 mJ more at each reading."""

    def __init__(self, code: int = 0) -> None:
        self.used, self.code = [1000, 2000], code

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device) -> int:
        device._obj.value = index
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, value) -> int:
        index = device.value or 0
        value._obj.value = self.used[index]
        self.used[index] += 500
        return self.code


@pytest.mark.parametrize(("code", "found"), [(0, (1.0, "nvml:0, nvml:1")), (3, (None, None))])
def test_gpus_by_their_driver(tmp_path, monkeypatch, code, found):
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda _: Driver(code))
    meter = Meter(tmp_path / "absent")
    meter.start()
    assert meter.stop() == found


def test_no_driver_is_no_gpu(tmp_path, monkeypatch):
    def missing(name: str) -> None:
        raise OSError(f"{name} not found")

    monkeypatch.setattr(energy.ctypes, "CDLL", missing)
    meter = Meter(tmp_path / "absent")
    meter.start()
    assert meter.stop() == (None, None)
