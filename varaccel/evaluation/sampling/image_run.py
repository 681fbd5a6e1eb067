"""Many images for an evaluation: the same files however the work was split, and after whatever interruption.

Image i has seed `seed` + i, and call c draws images c·C to c·C + C - 1, B of them at once. C is the batch size B, or
up to four times as much for accelerators whose images have their own pace: in a call the place of a finished image is
taken by the next, so which images share a pass is decided by the call alone. Processes share calls, never parts of
them, and an interrupted call is made again whole. So files are bit-identical for any number of processes and
interruptions on one kind of device, on a CPU with equally many threads in each; another batch size draws the same
random numbers, and only rounding can make a difference (see `varaccel.evaluation.metrics.rounding`).
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from varaccel.accelerators import AnyAccelerator
from varaccel.errors import InputError, ProcessFailed, VaraccelError
from varaccel.evaluation.metrics.image_sets import RUN_IMAGES
from varaccel.evaluation.sampling.folder_lock import LOCK, FolderLock
from varaccel.evaluation.sampling.run_settings import SETTINGS, RunSettings
from varaccel.files import atomic_path
from varaccel.nn.devices import has_gpu
from varaccel.pipelines.pixels import Rounding, to_uint8

PROMPTS, STATISTICS, BATCH_FILE = "prompts.json", "statistics", "samples.npz"

_OWN = (SETTINGS, PROMPTS, STATISTICS, RUN_IMAGES, LOCK)
_LEFTOVERS = ".*.tmp"
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class RunSummary:
    """What a finished run cost, over all of its images.

    Attributes:
        images: drawn.
        passes: forward passes of the model per batch of images, the mean over batches.
        tokens_per_pass: tokens of an image over `passes`.
        seconds: wall-clock time of all calls by phase, added up over processes; of runs beside other work no figure
            of speed.
        lossless: whether all calls kept the distribution of plain decoding.
    """

    images: int
    passes: float
    tokens_per_pass: float
    seconds: dict[str, float]
    lossless: bool


class ImageRun:
    """A run in a folder: `images/000000.png`, …, `run.json`, `prompts.json` and `statistics/`.

    Args:
        folder: new, or of an earlier run of the same settings, which then goes on.
        settings: what images depend on.
        prompts: one per image: descriptions, or labels of classes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: RunSettings, prompts: Sequence[str | int]
    ) -> None:
        if len(prompts) != settings.count:
            raise InputError(f"{settings.count} images need as many prompts, got {len(prompts)}.")
        self.folder, self.settings, self.prompts = Path(folder), settings, list(prompts)
        self.images = self.folder / RUN_IMAGES
        self._digits = max(6, len(str(settings.count - 1)))

    # -- what is there -------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """Calls of the run, of one batch or several each."""
        return -(-self.settings.count // self.settings.images_per_call)

    def image_path(self, index: int) -> Path:
        return self.images / f"{index:0{self._digits}}.png"

    def statistics_path(self, batch: int) -> Path:
        return self.folder / STATISTICS / f"{batch:0{self._digits}}.json"

    def indices(self, batch: int) -> range:
        """The images of a call."""
        size = self.settings.images_per_call
        return range(batch * size, min(batch * size + size, self.settings.count))

    def missing(self) -> list[int]:
        """Calls of which anything is not there yet."""
        return [
            batch
            for batch in range(self.batches)
            if not self.statistics_path(batch).is_file()
            or not all(_whole_png(self.image_path(index)) for index in self.indices(batch))
        ]

    def finished_images(self) -> int:
        """Images in the folder."""
        with os.scandir(self.images) as entries:
            return sum(entry.name.endswith(".png") for entry in entries)

    def begin(self) -> list[int]:
        """Make the folder, or check that its run is this one; the batches that are to be drawn.

        Raises:
            InputError: the folder holds a run of other settings or something else, is in use, or cannot be written to.
        """
        lock = FolderLock(self.folder)
        try:
            return self._begin(lock)
        finally:
            lock.release()

    def _begin(self, lock: FolderLock) -> list[int]:
        try:
            new = RunSettings.read(self.folder) is None
            if new and self.folder.is_dir() and not all(map(_is_own, self.folder.iterdir())):
                raise InputError(f"{self.folder} holds something else than a run; name an empty folder.")
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.begin()
        except OSError as error:
            raise _not_written(self.folder, error) from error
        earlier = RunSettings.read(self.folder)
        if earlier != self.settings and not (self.images.is_dir() and self.finished_images()):
            earlier = None  # it drew nothing, perhaps for want of memory: nothing is mixed up
        if earlier is not None and earlier != self.settings:
            now = asdict(self.settings)
            other = [
                f"{name} {value!r} instead of {now[name]!r}"
                for name, value in asdict(earlier).items()
                if value != now[name]
            ]
            raise InputError(
                f"{self.folder} holds a run of other settings ({'; '.join(other)}); name another folder, or the "
                "settings of that run."
            )
        try:
            if earlier is None:
                _write_json(self.prompts, self.folder / PROMPTS)
                _write_json(asdict(self.settings), self.folder / SETTINGS)
            for folder in (self.folder, self.images, self.folder / STATISTICS):
                folder.mkdir(exist_ok=True)
                if lock.held:  # else they may be of a process that is at work
                    for left in folder.glob(_LEFTOVERS):  # of a process that was killed
                        shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise _not_written(self.folder, error) from error
        return self.missing()

    # -- drawing -------------------------------------------------------------------------------------------

    def draw(
        self,
        pipe: Any,
        accelerator: AnyAccelerator,
        *,
        state: PartialState | None = None,
        progress: bool = True,
    ) -> RunSummary:
        """Draw what is missing.

        Every process of a distributed launch calls this with the same arguments; each draws its share of the batches.
        One launch at a time works in a folder.

        Args:
            pipe: where `settings` came from, on this process's device.
            accelerator: that of `settings`.
            state: of the launch, by default `launch_state()`.
            progress: show a bar with the remaining time (on the main process).

        Raises:
            InputError: see `begin`; a prompt that the model cannot draw, before anything is drawn; an image that cannot
                be written (a full disk). What was drawn is kept.
            ProcessFailed: one process of several cannot go on; the others know nothing of it.
        """
        state = launch_state() if state is None else state
        lock = FolderLock(self.folder)
        try:
            return self._draw(pipe, accelerator, state, lock, progress)
        finally:
            lock.release()

    def _draw(
        self, pipe: Any, accelerator: AnyAccelerator, state: PartialState, lock: FolderLock, progress: bool
    ) -> RunSummary:
        todo = self._shared_plan(pipe, state, lock)
        mine = todo[state.process_index :: state.num_processes]
        hidden = not progress or not state.is_main_process
        done = self.finished_images() if not hidden else 0
        with tqdm(
            total=self.settings.count, initial=done, desc="drawing", unit="image", disable=hidden or None
        ) as bar:
            for batch in mine:
                try:
                    self._draw_batch(pipe, accelerator, batch)
                except VaraccelError as error:
                    if state.num_processes == 1:
                        raise
                    raise ProcessFailed(
                        f"process {state.process_index} of {state.num_processes}: {error}"
                    ) from error
                if not hidden:  # what the others drew counts too
                    bar.update(self.finished_images() - bar.n)
            state.wait_for_everyone()
            if not hidden:
                bar.update(self.finished_images() - bar.n)
        return self.summary()

    def _shared_plan(self, pipe: Any, state: PartialState, lock: FolderLock) -> list[int]:
        """What is to be drawn, seen by the main process before anybody draws, so that all split the same list."""
        plan: list[Any] = [None, None]
        if state.is_main_process:
            try:
                self._check_prompts(pipe)
                plan[0] = self._begin(lock)
                lock.share()
            except InputError as error:
                plan[1] = str(error)
        if state.num_processes > 1:
            plan = broadcast_object_list(plan, from_process=0)
        if plan[1] is not None:
            raise InputError(plan[1])
        if not state.is_main_process:
            lock.join(state.process_index)
        return list(plan[0])

    def _check_prompts(self, pipe: Any) -> None:
        """Refuse, before hours of drawing, prompts that calls would refuse when their turn comes."""
        check = getattr(pipe, "check_prompts", None)
        if check is not None:
            check(self.prompts)

    def _draw_batch(self, pipe: Any, accelerator: AnyAccelerator, batch: int) -> None:
        indices = self.indices(batch)
        size = self.settings.batch_size
        several = {"batch_size": size} if self.settings.images_per_call > size else {}
        output = pipe(
            self.prompts[indices.start : indices.stop],
            seed=self.settings.seed + indices.start,
            accelerator=accelerator,
            output_type="raw",
            **several,
            **self.settings.call,
        )
        pixels = to_pixels(output.images, self.settings.image_size, self.settings.rounding).cpu().numpy()
        try:
            for index, image in zip(indices, pixels, strict=True):
                path = self.image_path(index)
                if not _whole_png(path):
                    with atomic_path(path) as temporary:
                        Image.fromarray(image).save(temporary)
            _write_json(output.stats.to_dict(), self.statistics_path(batch))
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def summary(self) -> RunSummary:
        """What all calls so far cost."""
        told = [
            json.loads(self.statistics_path(batch).read_text(encoding="utf-8"))
            for batch in range(self.batches)
            if self.statistics_path(batch).is_file()
        ]
        batches = sum(-(-one["images"] // (one.get("batch_size") or one["images"])) for one in told)
        passes = sum(one["passes"] for one in told) / batches
        phases = told[0]["seconds"]
        return RunSummary(
            images=sum(one["images"] for one in told),
            passes=passes,
            tokens_per_pass=told[0]["tokens"] / passes,
            seconds={phase: sum(one["seconds"][phase] for one in told) for phase in phases},
            lossless=all(one["lossless"] for one in told),
        )

    # -- one file of all -----------------------------------------------------------------------------------

    def write_batch_file(self, path: str | os.PathLike[str] | None = None, *, progress: bool = True) -> Path:
        """All images as an ADM-style .npz file, written image by image: `arr_0` uint8 [N, H, W, 3], and for
        models of classes `arr_1`, labels int64 [N].

        Args:
            path: by default `samples.npz` in the folder.

        Raises:
            InputError: an image is missing, or the file cannot be written.
        """
        target = Path(path) if path is not None else self.folder / BATCH_FILE
        paths = [self.image_path(index) for index in range(self.settings.count)]
        absent = next((one for one in paths if not _whole_png(one)), None)
        if absent is not None:
            raise InputError(f"{absent} is missing, so the run is not finished; go on drawing first.")
        first = _pixels(paths[0])
        try:
            with (
                atomic_path(target) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            ):
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    shape = (len(paths), *first.shape)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for one in tqdm(
                        paths, desc=target.name, unit="image", leave=False, disable=not progress or None
                    ):
                        member.write(_pixels(one).tobytes())
                labels = [prompt for prompt in self.prompts if isinstance(prompt, int)]
                if len(labels) == len(paths):
                    with archive.open("arr_1.npy", "w") as member:
                        np.lib.format.write_array(member, np.asarray(labels, np.int64))
        except OSError as error:
            raise _not_written(target, error) from error
        return target


def raise_together(error: VaraccelError | None, state: PartialState) -> None:
    """Raise on every process what any of them met, so that none waits for one that has gone.

    Args:
        error: what this process met; every process of the launch calls this.

    Raises:
        VaraccelError: the error itself if all met the same, else `InputError` that names processes and reasons.
    """
    told = [None if error is None else str(error)]
    if state.num_processes > 1:
        told = gather_object(told)
    if error is not None and len(set(told)) == 1:
        raise error
    met = [f"process {index} of {len(told)}: {text}" for index, text in enumerate(told) if text is not None]
    if met:
        raise InputError(" ".join(met)) from error


def launch_state(cpu: bool = False) -> PartialState:
    """This process's place in a launch by `torchrun` or `accelerate launch`; one of one without them.

    Args:
        cpu: stay on the CPU where there is a GPU.

    Raises:
        InputError: the launch has several processes that do not find each other.
    """
    # without a GPU accelerate takes every process for the only one unless it is told that this is meant
    state = PartialState(cpu=cpu or not has_gpu())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched, but they do not find each other; launch with torchrun."
        )
    return state


def read_prompts(folder: str | os.PathLike[str]) -> list[str | int] | None:
    """The prompts of the run in a folder, None if it holds no run.

    Raises:
        InputError: the file is damaged.
    """
    path = Path(folder) / PROMPTS
    if not path.exists():
        return None
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} holds no prompts: {error}") from error
    return list(prompts)


def to_pixels(images: Tensor, size: int | None, rounding: Rounding) -> Tensor:
    """[-1, 1] float [B, 3, H, W] -> uint8 [B, S, S, 3]; resized before it is clamped, as LlamaGen's sampler does."""
    if size is not None and images.shape[-2:] != (size, size):
        images = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False)
    return to_uint8(images, rounding)


def _is_own(entry: Path) -> bool:
    """Whether a run made what lies in its folder, also if it was killed before it was described there."""
    return entry.name in _OWN or entry.match(_LEFTOVERS)


def _whole_png(path: Path) -> bool:
    """Whether a file is there and ends as a PNG file does: a power failure can leave an empty or cut one."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _write_json(values: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, default=str) + "\n")


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"nothing more could be written to {path} ({error.strerror or error}); make room and run the same command "
        "again: what is there is kept."
    )
