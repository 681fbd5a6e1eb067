"""Training jobs within one limited time: who gets how much of it, side by side or one after the other.

A job is a few command lines, run in one process per lane so that libraries are loaded once. Jobs that train have a
share of the time that is left when they begin, so that whatever took longer before them shortens all that follow alike;
the others have seconds set aside. A call that was killed goes on where it was when it is made again: finished jobs are
passed over, and training resumes from its checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varaccel.errors import InputError, VaraccelError
from varaccel.files import write_text

UNTIL = "{until}"
"""Stands in commands for the time at which the job has to end, in seconds since the epoch."""
_PAUSE = 0.2
_GRACE = 5.0
_FAILURE = 3
"""Exit status of a lane whose job failed and is marked."""


class JobFailed(VaraccelError):
    """A command of a job did not succeed."""


@dataclass(frozen=True)
class Job:
    """A part of a training plan.

    Attributes:
        name: of its log and of the file that says that it is done.
        commands: words after `python`, run one after the other.
        share: of the time, relative to the other jobs that train in the same lane; 0 for a job that does not train.
        seconds: set aside for it: the whole of a job without a share, what follows the training in one that has it.
        scenes: cache of images that must be there first.
        images: how many of them.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    share: float = 0.0
    seconds: float = 0.0
    scenes: Path | None = None
    images: int = 0


def slot_end(jobs: Sequence[Job], now: float, end: float) -> float:
    """When the first of the jobs left in a lane, or the training in it, has to end, so that all do by `end`."""
    first = jobs[0]
    if not first.share:
        return min(now + first.seconds, end)
    left = end - now - sum(job.seconds for job in jobs)
    return now + max(0.0, left) * first.share / sum(job.share for job in jobs)


class Timetable:
    """Jobs in lanes, and what is known of them in a folder.

    Args:
        lanes: jobs by lane; lanes run at the same time, the jobs of one after the other.
        folder: of logs and progress; a timetable found there is gone on with.
        minutes: for all calls together, as long as nothing is finished twice.
        closing: seconds of them that are left to the caller.
        begun: when the call began, as of `time.time`; now if None.

    Raises:
        InputError: no time, or the folder holds a timetable of other minutes.
    """

    def __init__(
        self,
        lanes: Mapping[str, Sequence[Job]],
        folder: Path,
        minutes: float,
        closing: float = 0.0,
        begun: float | None = None,
    ) -> None:
        if minutes * 60 <= closing:
            raise InputError(
                f"{minutes:g} minutes are too few; {closing:g} seconds are needed to finish alone."
            )
        self.lanes, self.folder, self.minutes = {k: tuple(v) for k, v in lanes.items()}, folder, minutes
        known = self._known()
        if known and known["minutes"] != minutes:
            raise InputError(
                f"{folder} holds a call of {known['minutes']:g} minutes; choose another folder or the same time."
            )
        self._spent = known.get("spent", 0.0)
        self._begun = time.time() if begun is None else begun
        self.end = self._begun + minutes * 60 - self._spent - closing

    # -- what is known ---------------------------------------------------------------------------------

    @property
    def spent(self) -> float:
        """Seconds of all calls."""
        return self._spent + time.time() - self._begun

    def unfinished(self) -> list[str]:
        """Names of the jobs that failed or were not reached."""
        jobs = [job for lane in self.lanes.values() for job in lane]
        return [job.name for job in jobs if outcome(self.folder, job) != "done"]

    def summary(self) -> str:
        """What became of every job, a line for each, and of the time."""
        lines = []
        for jobs in self.lanes.values():
            for job in jobs:
                path = _path(self.folder, job)
                known = (
                    json.loads(path.read_text(encoding="utf-8"))
                    if path.is_file()
                    else {"outcome": "not finished"}
                )
                seconds = f", {known['seconds']:.0f} s" if known.get("seconds") else ""
                failure = f": {known['failure']}" if known.get("failure") else ""
                lines.append(f"{job.name}: {known['outcome']}{seconds}{failure}")
        return "\n".join([*lines, f"{self.spent / 60:.1f} of {self.minutes:g} minutes"])

    def _known(self) -> dict[str, Any]:
        path = self.folder / "timetable.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def save(self) -> None:
        write_text(
            json.dumps({"minutes": self.minutes, "spent": round(self.spent, 1)}),
            self.folder / "timetable.json",
        )

    # -- running ---------------------------------------------------------------------------------------

    def run(self) -> list[str]:
        """Run what is left, until the end at the latest; the names of the jobs that failed or were not reached."""
        for jobs in self.lanes.values():
            for job in jobs:  # what failed in an earlier call may succeed now
                if outcome(self.folder, job) == "failed":
                    _path(self.folder, job).unlink()
        processes: dict[str, Any] = dict.fromkeys(self.lanes)
        saved = 0.0
        try:
            while time.time() < self.end:
                processes = {lane: self._process(lane, process) for lane, process in processes.items()}
                if not any(processes.values()):
                    break
                if time.time() - saved > 1:
                    self.save()
                    saved = time.time()
                time.sleep(_PAUSE)
        finally:
            _stop([process for process in processes.values() if process is not None])
            self.save()
        return self.unfinished()

    def _process(self, lane: str, process: Any) -> Any:
        """The process of a lane: the one that runs, a new one for the jobs that are left, or None if none are."""
        if process is not None and process.is_alive():
            return process
        left = [job for job in self.lanes[lane] if outcome(self.folder, job) is None]
        if left and process is not None and process.exitcode not in (0, _FAILURE):
            # killed by the system, for its memory for instance: not to be tried again and again
            mark(self.folder, left.pop(0), f"its process ended with {process.exitcode}")
        return self._start(lane, self.lanes[lane]) if left else None

    def _start(self, lane: str, jobs: Sequence[Job]) -> Any:
        process = multiprocessing.get_context("spawn").Process(
            target=run_lane, args=(jobs, self.folder, self.end), name=lane
        )
        process.start()
        return process


def outcome(folder: Path, job: Job) -> str | None:
    """ "done", "failed", or None if the job has not ended."""
    path = _path(folder, job)
    return json.loads(path.read_text(encoding="utf-8"))["outcome"] if path.is_file() else None


def mark(folder: Path, job: Job, failure: str = "", seconds: float | None = None) -> None:
    """Write down that a job has ended, and why if it failed."""
    told = {"outcome": "failed" if failure else "done", "seconds": seconds, "failure": failure}
    write_text(json.dumps(told) + "\n", _path(folder, job))


def _path(folder: Path, job: Job) -> Path:
    return folder / "jobs" / f"{job.name}.json"


def run_lane(jobs: Sequence[Job], folder: Path, end: float) -> None:
    """Run the jobs of a lane that have not ended, in this process, their output into logs.

    It ends at the first failure, since a library may be in any state after it; the rest is for a new process.
    """
    os.setsid()  # so that what it started can be stopped with it
    # what a shell starts in the background ignores Ctrl-C, and so would this; `_stop` needs it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for index, job in enumerate(jobs):
        if outcome(folder, job) is not None:
            continue
        begun = time.time()
        log = folder / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            for number in (1, 2):  # of the process, for what it starts itself
                os.dup2(file.fileno(), number)
        failure = ""
        try:
            _wait_for_images(job, end)
            until = slot_end(jobs[index:], time.time(), end)
            for command in job.commands:
                run_here([word.replace(UNTIL, str(until)) for word in command])
        except Exception as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
        mark(folder, job, failure, round(time.time() - begun, 1))
        if failure:
            sys.exit(_FAILURE)


def _end_with(parent: int) -> None:
    """A lane whose caller was killed would train on beside the next call, in the same folders."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def run_here(command: Sequence[str]) -> None:
    """A Python command line in this process: `-m` and a module, or a script.

    Raises:
        JobFailed: it ends with another status than 0.
    """
    before = sys.argv
    module = command[0] == "-m"
    sys.argv = list(command[1:] if module else command)
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise JobFailed(f"{' '.join(command)} ended with {ended.code}.") from None
    finally:
        sys.argv = before


def _wait_for_images(job: Job, end: float) -> None:
    if job.scenes is None:
        return
    from varaccel.scenes.cache import finished_images  # with torch, which not every lane needs

    while finished_images(job.scenes) < job.images:
        if time.time() > end:
            raise JobFailed(f"{job.scenes} never had the {job.images} images that {job.name} begins with.")
        time.sleep(_PAUSE)


def _stop(processes: Sequence[Any]) -> None:
    """End lanes and what they started: first as Ctrl-C does, upon which a training run saves."""
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            try:
                os.killpg(process.pid, signal_number)
            except ProcessLookupError:  # it had not begun a group of its own yet
                os.kill(process.pid, signal_number)
        limit = time.time() + _GRACE
        for process in alive:
            process.join(max(0.0, limit - time.time()))
