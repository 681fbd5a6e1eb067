"""Jobs within one limited time: how it is divided, what ends when, what a second call goes on with."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from varaccel.errors import InputError
from varaccel.training.timetable import UNTIL, Job, Timetable, outcome, slot_end

NOTE = "import sys, pathlib, time; p = pathlib.Path(sys.argv[1]); "


def named(name: str, share: float = 0.0, seconds: float = 0.0) -> Job:
    return Job(name, (), share=share, seconds=seconds)


# -- how the time is divided ---------------------------------------------------------------------------


def test_training_jobs_share_what_the_others_leave() -> None:
    lane = [
        named("tokenizer", 1),
        named("encode", seconds=10),
        named("host", 3, seconds=5),
        named("judge", seconds=5),
    ]
    assert slot_end(lane, now=100.0, end=200.0) == pytest.approx(100 + 80 / 4)
    assert slot_end(lane[1:], now=120.0, end=200.0) == pytest.approx(130)
    # the tokenizer took twice its time: the host has what is left, less what comes after its training
    assert slot_end(lane[2:], now=150.0, end=200.0) == pytest.approx(190)
    assert slot_end(lane[3:], now=198.0, end=200.0) == pytest.approx(200), "never beyond the end"


def test_a_lane_that_is_late_does_not_train() -> None:
    assert slot_end([named("host", 1, seconds=5)], now=100.0, end=103.0) == 100.0


# -- what runs -----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """A job that runs a line of Python with a file of its name as its argument."""

    def make(name: str, line: str, **sizes: float) -> Job:
        script = tmp_path / f"{name}.py"
        script.write_text(NOTE + line)
        return Job(name, ((str(script), str(tmp_path / name), UNTIL),), **sizes)

    return make


WRITE = "p.write_text(p.read_text() + 'again' if p.exists() else sys.argv[2])"


def test_a_failed_job_stops_nothing_but_itself(tmp_path: Path, job: Callable[..., Job]) -> None:
    lanes = {
        "one": [
            job("broken", "raise ValueError('no such thing')"),
            job("killed", "import os; os.kill(os.getpid(), 9)"),
            job("refused", "print('said'); sys.exit(2)"),
            job("fine", WRITE, share=1.0),
        ],
        "two": [job("other", WRITE, seconds=1.0)],
    }
    table = Timetable(lanes, tmp_path / "out", minutes=1.0)
    begun = time.time()
    assert table.run() == ["broken", "killed", "refused"]
    assert begun < float((tmp_path / "other").read_text(encoding="utf-8")) < begun + 30
    assert begun + 30 < float((tmp_path / "fine").read_text(encoding="utf-8")) <= table.end
    assert "no such thing" in (tmp_path / "out" / "logs" / "broken.log").read_text(encoding="utf-8")
    assert "said" in (tmp_path / "out" / "logs" / "refused.log").read_text(encoding="utf-8")
    told = table.summary()
    assert "broken: failed" in told
    assert "killed: failed: its process ended with -9" in told
    assert "of 1 minutes" in told

    # a second call passes over what is done, and tries again what failed
    (tmp_path / "broken.py").write_text(NOTE + WRITE)
    again = Timetable(lanes, tmp_path / "out", minutes=1.0)
    assert again.end < time.time() + 60, "the time of the first call is spent"
    assert again.run() == ["killed", "refused"]
    assert "again" not in (tmp_path / "fine").read_text(encoding="utf-8")
    assert (tmp_path / "broken").is_file()


def test_what_is_late_is_stopped_as_by_ctrl_c(tmp_path: Path, job: Callable[..., Job]) -> None:
    line = "\np.write_text('begun')\ntry:\n    time.sleep(100)\nfinally:\n    p.write_text('saved')"
    table = Timetable({"lane": [job("slow", line), job("never", WRITE)]}, tmp_path / "out", minutes=1.0)

    def end_when_it_has_begun() -> None:
        while not (tmp_path / "slow").exists():
            time.sleep(0.05)
        table.end = time.time()

    threading.Thread(target=end_when_it_has_begun, daemon=True).start()
    assert table.run() == ["slow", "never"]
    assert time.time() - table.end < 20
    assert (tmp_path / "slow").read_text(encoding="utf-8") == "saved"
    assert outcome(tmp_path / "out", table.lanes["lane"][0]) is None, "to be gone on with"
    assert not (tmp_path / "never").exists()


def test_a_folder_keeps_its_time(tmp_path: Path) -> None:
    Timetable({}, tmp_path, minutes=1.0).run()
    assert json.loads((tmp_path / "timetable.json").read_text(encoding="utf-8"))["minutes"] == 1.0
    with pytest.raises(InputError, match="choose another folder or the same time"):
        Timetable({}, tmp_path, minutes=2.0)
    with pytest.raises(InputError, match="are too few"):
        Timetable({}, tmp_path / "new", minutes=0.1, closing=10.0)


def test_images_are_waited_for(tmp_path: Path) -> None:
    hungry = Job("hungry", (), scenes=tmp_path / "scenes", images=10)
    table = Timetable({"lane": [hungry]}, tmp_path / "out", minutes=0.05)
    assert table.run() == ["hungry"]
