"""What `eval/sample.py` and `eval/fid.py` ask on the command line about the images to draw."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varaccel.errors import InputError, ProcessFailed, VaraccelError
from varaccel.evaluation.sampling.presets import PRESETS, Preset, get_preset

_CALL = ("guidance_scale", "temperature", "top_k", "top_p", "num_iterations", "head_steps")
_BATCH_SIZE = 32
_AUTO = "auto"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say what is drawn, with which model, how and where."""
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"a published protocol, which other options change: {', '.join(PRESETS)}",
    )
    group.add_argument("--model", help="shipped or published model, folder or hub id")
    group.add_argument(
        "--prompts",
        metavar="SOURCE",
        help="scenes, classes, classes:random, or a file of one prompt per line; by default what fits the model",
    )
    group.add_argument("--count", type=int, help="images")
    group.add_argument("--seed", type=int, default=0, help="image i has seed + i (default %(default)s)")
    group.add_argument(
        *("-a", "--accelerator"), metavar="NAME:KEY=VALUE,...", help="how to decode; plain by default"
    )
    for name, kind in (("guidance-scale", float), ("temperature", float), ("top-k", int), ("top-p", float)):
        group.add_argument(f"--{name}", type=kind, help="the model's own by default")
    for name in ("num-iterations", "head-steps"):
        group.add_argument(f"--{name}", type=int, help="of MAR models; the model's own by default")
    group.add_argument(
        "--image-size", type=int, help="resize images to this side (bicubic) before they are rounded"
    )
    group.add_argument(
        "--rounding", choices=("nearest", "down"), help="to 8 bits; VAR's and CoDe's authors round down"
    )
    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--batch-size",
        type=int,
        default=_BATCH_SIZE,
        help="images that are drawn at once (default %(default)s)",
    )
    group.add_argument("--device", choices=(_AUTO, "cpu", "cuda"), default=_AUTO)
    group.add_argument(
        "--threads", type=int, help="of a process on a CPU; as many as torch takes, or as the run began with"
    )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32, or what the preset says")
    group.add_argument("--compile", action="store_true", help="compile the networks first")


@dataclass(frozen=True)
class Started:
    """A run that is ready to be drawn.

    Attributes:
        pipe, accelerator: what draws.
        run: the folder.
        state: this process's part of the launch.
        preset: the protocol, if one was named.
    """

    pipe: Any
    accelerator: Any
    run: Any
    state: Any
    preset: Preset | None

    def draw(self) -> Any:
        """Draw what is missing; see `ImageRun.draw`."""
        return self.run.draw(self.pipe, self.accelerator, state=self.state)


def start_run(options: argparse.Namespace, folder: Path) -> Started:
    """Load the model and prepare the folder of a run, as typed.

    Raises:
        InputError: options that do not go together, no model, no GPU.
        CheckpointError: the model cannot be loaded.
    """
    preset = None if options.preset is None else get_preset(options.preset)

    def chosen(name: str, otherwise: Any = None) -> Any:
        typed = getattr(options, name)
        if typed is not None:
            return typed
        return otherwise if preset is None else getattr(preset, name)

    if chosen("model") is None:
        raise InputError("name a --model, or a --preset that has one.")

    import torch

    from varaccel.accelerators.notation import parse_accelerator
    from varaccel.evaluation.sampling.image_run import launch_state, raise_together
    from varaccel.evaluation.sampling.run_settings import RunSettings
    from varaccel.nn.devices import HOST
    from varaccel.pipelines.placement import check_place

    if options.threads is not None and options.threads < 1:
        raise InputError(f"threads must be at least 1, got {options.threads}.")
    dtype = chosen("dtype", "float32")
    check_place(HOST if options.device == _AUTO else options.device, dtype)
    accelerator = parse_accelerator(chosen("accelerator", "plain"))
    earlier = RunSettings.read(folder)
    threads: int | None = options.threads or (None if earlier is None else earlier.threads)
    if threads is not None:
        torch.set_num_threads(threads)
    state = launch_state(cpu=options.device == HOST)
    if not state.is_main_process:
        import logging

        logging.disable(logging.WARNING)  # said once is enough
    failed, started = None, None
    try:
        started = _prepared(options, folder, preset, accelerator, state, chosen)
    except VaraccelError as error:
        failed = error
    raise_together(failed, state)
    assert started is not None
    return started


def _prepared(
    options: argparse.Namespace,
    folder: Path,
    preset: Preset | None,
    accelerator: Any,
    state: Any,
    chosen: Callable[..., Any],
) -> Started:
    """What each process of a launch does for itself, so that any of them may fail."""
    import inspect

    from varaccel.evaluation.sampling.image_run import ImageRun
    from varaccel.evaluation.sampling.prompt_lists import default_source, list_prompts
    from varaccel.evaluation.sampling.run_settings import RunSettings
    from varaccel.pipelines.call_options import call_options
    from varaccel.pipelines.placement import move, open_pipeline

    model = chosen("model")
    pipe: Any = open_pipeline(model, quiet=True)
    call = {**({} if preset is None else preset.call)}
    call |= call_options(pipe, model, **{name: getattr(options, name) for name in _CALL})
    for name in inspect.signature(type(pipe).__call__).parameters:
        if name in pipe.config:  # the model's own settings, so that the record is complete
            call.setdefault(name, pipe.config[name])
    move(pipe, str(state.device), chosen("dtype", "float32"))
    if options.compile:
        pipe.compile()
    source = chosen("prompts") or default_source(pipe, model)
    prompts = list_prompts(pipe, source, chosen("count"), options.seed)
    settings = RunSettings.of(
        pipe,
        prompts,
        accelerator,
        model=model,
        source=source,
        call=call,
        seed=options.seed,
        batch_size=options.batch_size,
        image_size=chosen("image_size"),
        rounding=chosen("rounding", "nearest"),
        compiled=options.compile,
    )
    return Started(pipe, accelerator, ImageRun(folder, settings, prompts), state, preset)


def tell_failure(script: str, error: VaraccelError) -> None:
    """Print why a script ends, and leave the reason where the launcher looks for it.

    What all processes of a launch met is printed by the main one, what one met alone by that one.
    """
    message = f"{script}: {error}"
    if os.environ.get("RANK", "0") == "0" or isinstance(error, ProcessFailed):
        print(message, flush=True)
    # torchrun and accelerate show it under "root cause"; without the file they only tell a number
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
