"""The file by which a measured process tells where it is, also when it is killed in the middle of a line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocketdiffusion_bench.events import EventLog, read_events


def test_what_was_written_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    with log.timed("load"):
        pass
    log.begin("prepare")
    log.configuration({"device": "a:cpu"})
    log.picture(tmp_path / "0.png")
    log.span("image", 1.0, 3.0)
    log.done(123)
    found = read_events(tmp_path / "events")
    assert [span.name for span in found.spans] == ["load", "image"]
    assert (found.spans[1].start, found.spans[1].end) == (1.0, 3.0)
    assert (found.configuration, found.pictures) == ({"device": "a:cpu"}, [tmp_path / "0.png"])
    assert found.done and found.peak_rss == 123 and found.place is None and found.done_at is not None


def test_a_cut_last_line_is_left_out_and_the_place_of_death_is_known(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    with log.timed("load"):
        pass
    log.begin("tokenise")
    log.begin("open:unet")
    log.begin("open:vae_decoder")
    log.span("open:vae_decoder", 1.0, 2.0)
    with open(tmp_path / "events", "ab") as file:
        file.write(b'{"event": "span", "name": "open:un')
    found = read_events(tmp_path / "events")
    assert not found.done and found.place == "open:unet, tokenise"


def test_a_process_that_told_nothing_died_at_its_start(tmp_path: Path) -> None:
    assert read_events(tmp_path / "absent").place == "start"


def test_a_block_that_fails_leaves_its_beginning_only(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events")
    with pytest.raises(OSError), log.timed("load"):
        raise OSError
    found = read_events(tmp_path / "events")
    assert found.spans == [] and found.place == "load"


def test_done_without_its_time_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "events").write_bytes(b'{"event": "done"}\n')
    found = read_events(tmp_path / "events")
    assert found.done and found.done_at is None and found.peak_rss is None


def test_events_of_several_threads_stay_whole_lines(tmp_path: Path) -> None:
    import threading

    log = EventLog(tmp_path / "events")
    threads = [
        threading.Thread(target=lambda n=n: [log.span(f"{n}" * 50, i, i + 1) for i in range(200)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_events(tmp_path / "events").spans) == 800
    assert os.path.getsize(tmp_path / "events") > 0
