"""Runs of images: the same files however the work is split, and after whatever interruption."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.scripts import ROOT, load_script
from tests.tiny import CLASSES, PROMPTS, pipeline
from varaccel import InputError, Jacobi, Plain, ZipAR
from varaccel.evaluation.metrics.rounding import compare_batch_sizes
from varaccel.evaluation.sampling import folder_lock
from varaccel.evaluation.sampling import image_run as image_run
from varaccel.evaluation.sampling.image_run import ImageRun, read_prompts, to_pixels
from varaccel.evaluation.sampling.presets import IMAGENET_256, PRESETS, get_preset
from varaccel.evaluation.sampling.prompt_lists import default_source, list_prompts
from varaccel.evaluation.sampling.run_settings import RunSettings
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.pipelines.memory import OutOfMemory
from varaccel.shipped import shipped_models
from varaccel.tokenizers.text import WordTokenizer

CALLS: dict[str, dict[str, Any]] = {
    "c2i": {},
    "var-class": {},
    "mar-class": {"num_iterations": 4, "head_steps": 5},
}


def new_run(
    folder: Path, model: str = "c2i", count: int = 21, accelerator: Any = None, **others: Any
) -> ImageRun:
    pipe = pipeline(model)
    prompts = list_prompts(pipe, "classes", count)
    settings = RunSettings.of(
        pipe,
        prompts,
        accelerator or Plain(),
        **{"model": model, "source": "classes", "call": CALLS[model], "seed": 5, "batch_size": 4, **others},
    )
    return ImageRun(folder, settings, prompts)


def drawn(folder: Path, model: str = "c2i", accelerator: Any = None, **others: Any) -> ImageRun:
    run = new_run(folder, model, accelerator=accelerator, **others)
    run.draw(pipeline(model), accelerator or Plain(), progress=False)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


# -- what is drawn -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", CALLS)
def test_images_are_those_of_single_calls(tmp_path: Path, model: str) -> None:
    run = drawn(tmp_path / "run", model, count=6)
    pipe = pipeline(model)
    for index in range(6):
        expected = pipe(run.prompts[index], seed=5 + index, **CALLS[model]).images[0]
        with Image.open(run.image_path(index)) as found:
            difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
        assert difference.max() <= 1  # another batch may round another way
    assert read_prompts(tmp_path / "run") == [0, 1, 2, 3, 4, 0]


def test_settings_and_cost_are_recorded(tmp_path: Path) -> None:
    run = drawn(tmp_path / "run", accelerator=ZipAR(window=2))
    settings = RunSettings.read(tmp_path / "run")
    assert settings == run.settings
    assert settings is not None
    assert settings.accelerator == "zipar"
    assert settings.options["window"] == 2
    summary = run.summary()
    assert summary.images == 21
    assert not summary.lossless
    assert summary.passes == pipeline("c2i")(0, accelerator=ZipAR(window=2)).stats.passes
    assert summary.tokens_per_pass == pytest.approx(16 / summary.passes)


def test_pixels_are_resized_before_they_are_rounded() -> None:
    images = torch.linspace(-1.3, 1.3, 2 * 3 * 24 * 24).view(2, 3, 24, 24)
    resized = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", align_corners=False)
    nearest = to_pixels(images, 16, "nearest")
    assert nearest.shape == (2, 16, 16, 3)
    assert nearest.dtype == torch.uint8
    expected = (resized * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(nearest, expected)
    down = to_pixels(images, 16, "down")
    exact = (resized.clamp(-1, 1).permute(0, 2, 3, 1) + 1) * 127.5
    assert torch.equal(down, exact.floor().to(torch.uint8))


# -- what fails in one process of several ---------------------------------------------------------------

_FAILING = """
import errno, os, sys
from pathlib import Path
from PIL import Image
from varaccel.evaluation.sampling.run_arguments import tell_failure
from varaccel.errors import InputError, VaraccelError
from varaccel.evaluation.sampling.image_run import launch_state, raise_together
from tests.evaluation.test_image_run import drawn

kind, alone = sys.argv[2], os.environ["RANK"] == "1"


def full(self, path, *args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


try:
    if kind == "drawing" and alone:
        Image.Image.save = full
    if kind in ("one", "all"):
        error = InputError("no such thing.") if alone or kind == "all" else None
        raise_together(error, launch_state(cpu=True))
    drawn(Path(sys.argv[1]), "c2i", count=45)
except VaraccelError as error:
    tell_failure("script.py", error)
    sys.exit(2)
"""


@pytest.mark.slow  # starts launchers
@pytest.mark.parametrize(
    ("kind", "printed", "times"),
    [
        ("drawing", "script.py: process 1 of 2: nothing more could be written", 1),
        ("one", "script.py: process 1 of 2: no such thing.", 1),
        ("all", "script.py: no such thing.", 1),
    ],
)
def test_the_launcher_tells_why_a_process_failed(tmp_path: Path, kind: str, printed: str, times: int) -> None:
    script = tmp_path / "draw.py"
    script.write_text(_FAILING)
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), str(tmp_path / "run"), kind),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert ended.stdout.count(printed) == times, ended.stdout + ended.stderr
    reason = printed.removeprefix("script.py: ")
    root = ended.stderr.partition("Root Cause")[2]
    assert reason in root, ended.stderr


# -- how the work is split -----------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from tests.evaluation.test_image_run import drawn
from varaccel.accelerators.jacobi import Jacobi
for model in sys.argv[2:]:
    drawn(Path(sys.argv[1]) / model, model, count=45)
drawn(Path(sys.argv[1]) / "jacobi", "c2i", Jacobi(4, "none"), count=45)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_files(tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(_SCRIPT)
    models = ("c2i", "mar-class")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), str(tmp_path / "two"), *models),
        ],
        check=True,
        env=environment,
        cwd=ROOT,
        timeout=240,
    )
    for model in models:
        drawn(tmp_path / "one" / model, model, count=45)
        one, two = contents(tmp_path / "one" / model), contents(tmp_path / "two" / model)
        assert len(one) == 45
        assert one == two
        assert len(list((tmp_path / "two" / model / "statistics").iterdir())) == 12
    drawn(tmp_path / "one" / "jacobi", "c2i", Jacobi(4, "none"), count=45)
    assert contents(tmp_path / "one" / "jacobi") == contents(tmp_path / "two" / "jacobi")
    assert len(list((tmp_path / "two" / "jacobi" / "statistics").iterdir())) == 6, "calls of two batches"


def test_calls_of_several_batches_are_the_same_in_any_order_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Jacobi(4, "none")
    whole = drawn(tmp_path / "whole", accelerator=accelerator, count=21, batch_size=2)
    assert whole.settings.images_per_call == 4
    told = [json.loads(whole.statistics_path(batch).read_text()) for batch in range(whole.batches)]
    assert [(one["images"], one["batch_size"]) for one in told] == [*[(4, 2)] * 5, (1, 1)]
    summary = whole.summary()
    assert summary.passes == sum(one["passes"] for one in told) / 11
    assert 1 < summary.tokens_per_pass == pytest.approx(16 / summary.passes)

    run = new_run(tmp_path / "run", accelerator=accelerator, count=21, batch_size=2)
    pipe = pipeline("c2i")
    for batch in (5, 3, 1):
        run.begin()
        run._draw_batch(pipe, accelerator, batch)
    save, saved = Image.Image.save, 0

    def killed(self: Any, *args: Any, **options: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 7:
            raise KeyboardInterrupt
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.draw(pipe, accelerator, progress=False)
    monkeypatch.undo()
    assert run.finished_images() == 9 + 6
    drawn(tmp_path / "run", accelerator=accelerator, count=21, batch_size=2)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("model", CALLS)
def test_another_batch_size_draws_the_same_numbers(model: str) -> None:
    report = compare_batch_sizes(
        pipeline(model),
        [i % len(CLASSES) for i in range(40)],
        (1, 7),
        seed=3,
        progress=False,
        **CALLS[model],
    )
    # one in a hundred is what rounding may change in float32
    assert report.changed.share <= 0.025, str(report)
    assert "of 40 images differ" in str(report)
    assert (report.largest is None) == (model != "mar-class")


def test_other_seeds_are_other_images() -> None:
    """The comparison sees a difference where there is one."""

    class Drifting:
        """Draws with seeds that depend on the batch."""

        def __call__(self, prompts: list[Any], *, seed: int, **call: Any) -> Any:
            return pipeline("c2i")(prompts, seed=seed * len(prompts), **call)

    report = compare_batch_sizes(Drifting(), [0] * 12, (2, 3), progress=False)
    assert report.changed.share > 0.5
    with pytest.raises(InputError, match="batch sizes of at least 1"):
        compare_batch_sizes(Drifting(), [0], (0, 1))


# -- interruptions -------------------------------------------------------------------------------------


def _draw_slowly(folder: str) -> None:
    """Draw with some time between batches, in which the process can be killed."""
    run = new_run(Path(folder), count=60, batch_size=3)
    pipe = pipeline("c2i")

    def slow(*prompts: Any, **call: Any) -> Any:
        time.sleep(0.02)
        return pipe(*prompts, **call)

    run.draw(slow, Plain(), progress=False)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    moments = random.Random(0)
    kills = 0
    for _ in range(4):
        process = context.Process(target=_draw_slowly, args=(str(folder),))
        # a kill may have left a temporary folder among them, which the next run clears away
        before = len(list((folder / "images").glob("*.png")))
        process.start()
        assert process.pid is not None
        while process.is_alive() and len(list((folder / "images").glob("*.png"))) <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 2
    # what is there after a kill is whole
    for path in (folder / "images").glob("*.png"):
        with Image.open(path) as image:
            image.load()
    drawn(folder, count=60, batch_size=3)
    drawn(tmp_path / "whole", count=60, batch_size=3)
    assert contents(folder) == contents(tmp_path / "whole")
    assert sorted(p.name for p in (folder / "statistics").iterdir()) == [f"{b:06}.json" for b in range(20)]


def test_only_what_is_missing_is_drawn_again(tmp_path: Path) -> None:
    run = drawn(tmp_path / "run")
    whole = contents(tmp_path / "run")
    run.image_path(2).unlink()  # of batch 0
    cut = run.image_path(9)  # of batch 2
    cut.write_bytes(cut.read_bytes()[:-7])
    run.statistics_path(4).unlink()
    untouched = run.image_path(14).stat().st_mtime_ns
    calls: list[int] = []

    def counting(prompts: list[Any], *, seed: int, **call: Any) -> Any:
        calls.append(seed - 5)
        return pipeline("c2i")(prompts, seed=seed, **call)

    again = new_run(tmp_path / "run")
    again.draw(counting, Plain(), progress=False)
    assert calls == [0, 8, 16]
    assert contents(tmp_path / "run") == whole
    assert run.image_path(14).stat().st_mtime_ns == untouched
    assert not again.missing()


def test_a_full_disk_is_one_sentence_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Image.Image.save
    written = []

    def full(self: Image.Image, path: Any, *args: Any, **kwargs: Any) -> None:
        if len(written) == 6:
            Path(path).write_bytes(b"half a pict")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        saved(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"No space left on device.*what is there is kept"):
        drawn(tmp_path / "run")
    monkeypatch.undo()
    assert len(contents(tmp_path / "run")) == 6
    drawn(tmp_path / "run")
    drawn(tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    drawn(tmp_path / "run")
    left = tmp_path / "run" / "images" / ".000003.png.abc.tmp"
    left.mkdir()
    (left / "000003.png").write_bytes(b"half")
    new_run(tmp_path / "run").begin()
    assert not left.exists()


@pytest.mark.parametrize("name", [".prompts.json.abc.tmp", ".run.json.abc.tmp"])
def test_killed_before_the_run_was_described(tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    drawn(tmp_path / "run", count=4)
    assert not (tmp_path / "run" / name).exists()


# -- several launches ----------------------------------------------------------------------------------


def _attempt(folder: str, delay: float, answers: Any) -> None:
    """Start a run after a while and tell how it ended."""
    time.sleep(delay)
    try:
        _draw_slowly(folder)
        answers.put("done")
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")


def _attempts(folder: Path, delays: list[float]) -> list[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.Queue()
    started = [context.Process(target=_attempt, args=(str(folder), delay, answers)) for delay in delays]
    for process in started:
        process.start()
    told = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    return told


@pytest.mark.slow  # starts interpreters
@pytest.mark.parametrize("delays", [[0.0] * 4, [0.1 * k for k in range(6)]])
def test_processes_started_on_a_live_run_leave_it_alone(tmp_path: Path, delays: list[float]) -> None:
    told = _attempts(tmp_path / "run", delays)
    assert "done" in told
    refused = [answer for answer in told if answer != "done"]
    assert all("is in use: process " in answer and answer.startswith("InputError") for answer in refused), (
        told
    )
    drawn(tmp_path / "whole", count=60, batch_size=3)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_run_in_use_is_told_and_left_alone(tmp_path: Path) -> None:
    """By a thread of the same process, whose locks the system does not tell apart."""
    run = new_run(tmp_path / "run", count=8)
    told: list[str] = []

    def drawing(*prompts: Any, **call: Any) -> Any:
        left = tmp_path / "run" / "images" / ".000007.png.abc.tmp"
        left.mkdir(exist_ok=True)
        for other in (new_run(tmp_path / "run", count=8), new_run(tmp_path / "run", count=8, seed=6)):
            with pytest.raises(
                InputError, match=r"run is in use: process \d+ on .* draws there; wait"
            ) as caught:
                other.begin()
            told.append(str(caught.value))
        assert left.exists()
        return pipeline("c2i")(*prompts, **call)

    run.draw(drawing, Plain(), progress=False)
    assert len(told) == 4
    drawn(tmp_path / "run", count=8)


def test_processes_of_one_launch_share_a_folder_and_outlive_its_first(tmp_path: Path) -> None:
    """Locks of a launch of two: a third process stays out while either of them lives."""
    from varaccel.evaluation.sampling.folder_lock import FolderLock

    if sys.platform == "win32":
        pytest.skip("Windows has no such locks")

    def child(work: Callable[[], None]) -> int:
        """The exit status of a forked process that does the work and ends."""
        process = os.fork()
        if process == 0:
            try:
                work()
            except InputError:
                os._exit(7)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def other_launch() -> None:
        folder_lock._held.clear()  # it is another process, which knows nothing of this one
        FolderLock(tmp_path).begin()

    first = FolderLock(tmp_path)
    first.begin()
    assert child(other_launch) == 7
    first.share()
    assert child(lambda: FolderLock(tmp_path).join(1)) == 0, "a second process of the launch"
    assert child(other_launch) == 7
    first.release()
    assert child(other_launch) == 0
    second = FolderLock(tmp_path)
    second.join(1)  # the first was killed, the second is still at work
    assert child(other_launch) == 7
    second.release()
    assert child(other_launch) == 0


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cleared away there: it may be of a process that is at work."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)
    left = tmp_path / "run" / "images" / ".000003.png.abc.tmp"
    left.mkdir(parents=True)
    drawn(tmp_path / "run", count=4)
    assert left.exists()


# -- prompts that cannot be drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["\N{CAT FACE}", "...", "\u200b", "!?"])
def test_a_prompt_without_text_is_found_before_the_run(tmp_path: Path, bad: str) -> None:
    pipe = pipeline("t2i")
    file = tmp_path / "prompts.txt"
    file.write_text(f"a red cube\n\na blue sphere\n{bad}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.txt, line 4: the prompt .* holds no text"):
        list_prompts(pipe, str(file), None)
    assert len(list_prompts(pipe, str(file), 2)) == 2, "lines that are not drawn do not matter"
    with pytest.raises(InputError, match="line 4"):
        list_prompts(pipe, str(file), 7)


@pytest.mark.parametrize(
    ("model", "prompts", "message"),
    [
        ("t2i", ["a red cube", "a cube", "***"], "holds no text"),
        ("t2i", ["a red cube", 3], "takes descriptions, not labels"),
        ("c2i", [0, 1, 5], "go from 0 to 4, got 5"),
        ("var-class", [0, "zebra"], "unknown class 'zebra'"),
        ("mar-caption", ["a cube", " "], "holds no text"),
    ],
)
def test_a_run_asks_for_all_prompts_first(
    tmp_path: Path, model: str, prompts: list[Any], message: str
) -> None:
    pipe = pipeline(model)
    settings = RunSettings.of(
        pipe, prompts, Plain(), model=model, source="own", call={}, seed=0, batch_size=1
    )
    with pytest.raises(InputError, match=message):
        ImageRun(tmp_path / "run", settings, prompts).draw(pipe, Plain(), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("\u732b", "out its Chinese characters"),
        ("IMG_1234.jpg", "links, file names"),
        ("***", "signs;"),
        ("<b></b>", "markup"),
        ("\\n", "signs;"),
    ],
)
def test_captions_that_the_cleaner_empties_are_told_as_that(
    tmp_path: Path, prompt: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(WordTokenizer, "preprocess_prompt")  # as T5's tokenizer, which has none
    file = tmp_path / "prompts.txt"
    file.write_text(f"a red cube\n{prompt}\n", encoding="utf-8")
    pipe = pipeline("t2i")
    with pytest.raises(
        InputError, match=r"line 2: the prompt .* holds no text after the caption cleaner"
    ) as caught:
        list_prompts(pipe, str(file), None)
    assert reason in str(caught.value)
    with pytest.raises(InputError, match="after the caption cleaner"):
        pipe(["a red cube", prompt], seed=0)


def test_a_class_that_reads_prompts_in_its_own_way_is_not_asked() -> None:
    class Own(type(pipeline("c2i"))):  # type: ignore[misc]
        def _condition(self, prompts: Any) -> Any:
            return super()._condition([0] * len(prompts))

    pipe = pipeline("c2i")
    Own.from_pipe(pipe).check_prompts(["whatever"])
    with pytest.raises(InputError):
        pipe.check_prompts(["whatever"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\u2029", "\u0085"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, end: str, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    for text in (end.join(["a red cube", "", "a blue sphere"]), f"a red cube{end}a blue sphere{end}"):
        path.write_bytes(text.encode(encoding))
        assert list_prompts(pipeline("t2i"), str(path), None) == ["a red cube", "a blue sphere"]


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_separators_within_a_line_are_white_space(tmp_path: Path, sign: str) -> None:
    """A list that other tools count as two prompts is two prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"a red{sign}cube\na sphere\n", encoding="utf-8")
    prompts = list_prompts(pipeline("t2i"), str(path), None)
    assert [str(prompt).split() for prompt in prompts] == [["a", "red", "cube"], ["a", "sphere"]]


# -- folders that hold something else ------------------------------------------------------------------


def test_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    drawn(tmp_path / "run")
    with pytest.raises(InputError, match=r"other settings \(seed 5 instead of 6\)"):
        drawn(tmp_path / "run", seed=6)
    with pytest.raises(InputError, match="accelerator 'plain' instead of 'zipar'"):
        drawn(tmp_path / "run", accelerator=ZipAR(window=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="something else than a run"):
        drawn(tmp_path / "other")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match="does not describe a run"):
        drawn(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could be written"):
        drawn(tmp_path / "file" / "run")


def test_a_run_that_drew_nothing_may_change_its_mind(tmp_path: Path) -> None:
    """Such as one whose batch was too large for the memory."""

    def too_large(*_: Any, **__: Any) -> None:
        raise OutOfMemory("out of memory: make fewer images in one call.")

    with pytest.raises(OutOfMemory):
        new_run(tmp_path / "run", batch_size=21).draw(too_large, Plain(), progress=False)
    drawn(tmp_path / "run", batch_size=3)
    assert len(contents(tmp_path / "run")) == 21
    with pytest.raises(InputError, match="batch_size 3 instead of 21"):
        drawn(tmp_path / "run", batch_size=21)


def test_processes_that_do_not_find_each_other_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were launched"):
        drawn(tmp_path / "run")


def test_bad_settings(tmp_path: Path) -> None:
    for options, words in (
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"rounding": "up"}, "unknown rounding"),
    ):
        with pytest.raises(InputError, match=words):
            new_run(tmp_path, **options)
    with pytest.raises(InputError, match="21 images need as many prompts"):
        ImageRun(tmp_path, new_run(tmp_path).settings, [0])


# -- one file ------------------------------------------------------------------------------------------


def test_the_batch_file_holds_all_images(tmp_path: Path) -> None:
    run = drawn(tmp_path / "run")
    path = run.write_batch_file(progress=False)
    with np.load(path) as file:
        assert file["arr_0"].shape == (21, 8, 8, 3)
        for index in range(21):
            with Image.open(run.image_path(index)) as image:
                assert np.array_equal(file["arr_0"][index], np.asarray(image))
        assert file["arr_1"].tolist() == run.prompts
    run.image_path(20).unlink()
    with pytest.raises(InputError, match=r"000020\.png is missing"):
        run.write_batch_file()


# -- what is asked for ---------------------------------------------------------------------------------


def test_classes_are_asked_for_evenly_or_at_random() -> None:
    pipe = pipeline("c2i")
    even = list_prompts(pipe, "classes", 50)
    assert [even.count(label) for label in range(len(CLASSES))] == [10] * 5
    drawn_labels = list_prompts(pipe, "classes:random", 2000, seed=1)
    assert drawn_labels == list_prompts(pipe, "classes:random", 2000, seed=1)
    assert drawn_labels != list_prompts(pipe, "classes:random", 2000, seed=2)
    assert all(abs(drawn_labels.count(label) - 400) < 80 for label in range(5))


def test_prompts_of_a_file_are_repeated_in_turn(tmp_path: Path) -> None:
    pipe = pipeline("t2i")
    path = tmp_path / "prompts.txt"
    path.write_text("a red cube\n\n  a blue sphere \n")
    assert list_prompts(pipe, str(path), None) == ["a red cube", "a blue sphere"]
    assert list_prompts(pipe, str(path), 5) == ["a red cube", "a blue sphere"] * 2 + ["a red cube"]
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        list_prompts(pipe, str(path), 2)
    with pytest.raises(InputError, match="cannot be read as a file of prompts"):
        list_prompts(pipe, str(tmp_path / "none.txt"), 2)


def test_sources_fit_the_model() -> None:
    with pytest.raises(InputError, match="draws descriptions, not classes"):
        list_prompts(pipeline("t2i"), "classes", 2)
    with pytest.raises(InputError, match="draws classes, not descriptions"):
        list_prompts(pipeline("var-class"), "scenes", 2)
    with pytest.raises(InputError, match="say how many"):
        list_prompts(pipeline("c2i"), "classes", None)
    with pytest.raises(InputError, match="at least 1"):
        list_prompts(pipeline("c2i"), "classes", 0)
    assert default_source(pipeline("mar-class"), "mine") == "classes"
    assert default_source(pipeline("t2i"), "mini-var") == "scenes"
    with pytest.raises(InputError, match="name a file of prompts"):
        default_source(pipeline("t2i"), "mine")
    assert len(PROMPTS) > 1


# -- protocols -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runnable_as_they_stand(name: str) -> None:
    """Their models exist, and their calls and accelerators are accepted by a model of the family."""
    from varaccel.accelerators.notation import parse_accelerator

    preset = get_preset(name)
    assert preset.model in {*PUBLISHED, *shipped_models()}
    assert preset.source
    family = PUBLISHED[preset.model].family if preset.model in PUBLISHED else None
    accelerator = parse_accelerator(preset.accelerator)
    if family is None:
        assert preset.space == "scenes"
        return
    assert preset.reference == IMAGENET_256
    assert preset.count == 50_000
    tiny = {"llamagen": "c2i", "var": "var-class", "mar": "mar-class"}[family]
    pipe = pipeline(tiny)
    call = dict(preset.call)
    if family == "mar":
        call |= {"num_iterations": 4, "head_steps": 2}
    if family == "var":
        call["top_k"] = 9  # the vocabulary is smaller
        if isinstance(call.get("temperature"), list):
            assert len(call["temperature"]) == 10  # scales of the published models
            call["temperature"] = call["temperature"][: len(pipe.transformer.schedule)]
    output = pipe(0, seed=0, output_type="latent", **call)
    assert len(output.images) == 1
    assert issubclass(pipe.job_type, accelerator.job_type)


def test_an_unknown_preset_is_told() -> None:
    with pytest.raises(InputError, match="did you mean 'llamagen-xl-384'"):
        get_preset("llamagen-xl-348")


# -- the scripts ---------------------------------------------------------------------------------------


Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script of eval/ with arguments, checks its exit code, and returns what it printed."""

    def run(name: str, *arguments: object, code: int = 0) -> str:
        module = load_script(f"eval/{name}")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        assert module.main() == code
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_preset_is_drawn_measured_and_resumed(tmp_path: Path, script: Script) -> None:
    arguments = ["--preset", "mini-var", "--count", 12, "--batch-size", 12, "--out", tmp_path / "run"]
    measured = ["--reference", "scenes:20", "--cache", tmp_path / "cache", "--resamples", 5]
    told = script("fid.py", *arguments, *measured)
    assert "prompt adherence" in told
    assert "no FID" in told
    assert "count 12 instead of 500" in told
    assert len(contents(tmp_path / "run")) == 12
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["sets"][0]["run"]["model"] == "mini-var"
    assert report["sets"][0]["run"]["call"]["guidance_scale"] > 0
    assert {f["metric"] for f in report["sets"][0]["figures"]} == {
        *("fid", "is", "kid", "precision", "recall", "adherence")
    }
    before = contents(tmp_path / "run")
    # the run as it is, beside its own file, by sample.py and fid.py
    script("sample.py", *arguments, "--npz")
    assert contents(tmp_path / "run") == before
    told = script("fid.py", tmp_path / "run", tmp_path / "run" / "samples.npz", *measured)
    assert "within noise (+0" in told
    told = script("adherence.py", "--run", tmp_path / "run", "--out", tmp_path / "a.json")
    assert "all objects and relations" in told
    judged = json.loads((tmp_path / "a.json").read_text())
    figures = {f["metric"]: f for f in report["sets"][0]["figures"]}
    assert judged["rates"]["correct"]["share"] == figures["adherence"]["value"]


def test_scripts_refuse_in_one_sentence(tmp_path: Path, script: Script) -> None:
    told = script("fid.py", "--preset", "llamagen-xl-384", "--out", tmp_path / "run", code=2)
    assert told.startswith("fid.py: llamagen-xl-384 is measured against ADM's reference; fetch https")
    assert not (tmp_path / "run").exists()
    assert script("fid.py", code=2).startswith("fid.py: name either images or a --preset")
    assert script("sample.py", "--out", tmp_path, "--model", "mini-vra", code=2).startswith("sample.py: ")


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setattr("varaccel.evaluation.extra.find_spec", lambda name: None)
    told = script("fid.py", "somewhere", code=2)
    assert told == (
        "fid.py: this needs torch_fidelity and torchmetrics; install it with `pip install varaccel[eval]`.\n"
    )


def test_read_prompts_of_a_damaged_file(tmp_path: Path) -> None:
    assert read_prompts(tmp_path) is None
    (tmp_path / image_run.PROMPTS).write_text("[")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(tmp_path)
