"""Loading a pipeline and moving it to a device and precision, the same way for every command and script."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from varaccel.errors import InputError, unknown_name
from varaccel.nn.devices import GPU, HOST, KNOWN, is_available
from varaccel.nn.precision import cast
from varaccel.pipelines.auto import AutoPipeline
from varaccel.pipelines.load_options import FIXED_PRECISION
from varaccel.pipelines.loading import LoadablePipeline

PRECISIONS = ("float32", "bfloat16")


def open_pipeline(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    *,
    quiet: bool = False,
    **options: Any,
) -> LoadablePipeline:
    """Load a model by name and move it to a device and precision.

    Args:
        model: as `AutoPipeline.from_pretrained` takes it.
        device, dtype: see `move`; the pipeline stays as it was loaded if both are None.
        quiet: show no progress bars, neither while loading nor in calls of the pipeline, as where there is no terminal.
        options: further ones of `AutoPipeline.from_pretrained`.

    Raises:
        InputError: an unknown option, device or precision; there is no GPU.
        CheckpointError: the model cannot be loaded.
    """
    quiet = quiet or not sys.stderr.isatty()
    moved = device is not None or dtype is not None
    device, dtype = device or HOST, dtype or "float32"
    check_place(device, dtype)
    if quiet:
        with quiet_loading():
            pipe = AutoPipeline.from_pretrained(model, **options)
    else:
        pipe = AutoPipeline.from_pretrained(model, **options)
    pipe.set_progress_bar_config(disable=quiet, leave=False)
    if moved:
        move(pipe, device, dtype)
    return pipe


def check_place(device: str, dtype: str) -> None:
    """Refuse, before a model is loaded, a device or precision that it cannot run in.

    Raises:
        InputError: other than what `move` knows; there is no GPU.
    """
    kind, _, index = device.partition(":")
    if kind not in KNOWN or not (index.isdecimal() or index == device[len(kind) :]):
        raise unknown_name("device", device, KNOWN)
    if not is_available(device):
        missing = ("GPU" if kind == GPU else kind) + (f" {index}" if index else "")
        raise InputError(f"there is no {missing} that torch can use; leave --device {device} out.")
    if dtype not in PRECISIONS:
        raise unknown_name("precision", dtype, PRECISIONS)


def move(pipe: Any, device: str, dtype: str) -> None:
    """Move a pipeline to a device, and convert the networks that decide tokens to another precision.

    Args:
        device: one of `KNOWN`, such as "cuda" or "cuda:1".
        dtype: one of `PRECISIONS`; image tokenizer and text encoder keep theirs.
    """
    pipe.to(device)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in FIXED_PRECISION:
            cast(part, getattr(torch, dtype))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Show no progress bars while models are downloaded and loaded within the block."""
    switches = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()
