"""Everything that the images of a run depend on, as its folder records it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch

from varaccel.accelerators import AnyAccelerator
from varaccel.accelerators.auto import Auto
from varaccel.errors import InputError, unknown_name
from varaccel.evaluation.digests import text_digest, weights_digest
from varaccel.nn.devices import is_host
from varaccel.pipelines.pixels import Rounding
from varaccel.version import __version__

SETTINGS = "run.json"
BATCHES = 4
"""Most batches in a call of an accelerator whose images have their own pace; what is interrupted is lost."""
CALLS = 4
"""Fewest calls that are made of several batches, so that processes can share them."""


@dataclass(frozen=True)
class RunSettings:
    """Everything that images of a run depend on.

    Attributes:
        model: name of the model.
        weights: digest of its weights.
        accelerator, options: how it decodes.
        call: further arguments of the pipeline call.
        source: where prompts come from: "scenes", "classes", "classes:random" or a file.
        prompts: digest of the prompts.
        count: images.
        seed: of the first image.
        batch_size: images that are decoded at once.
        images_per_call: a multiple of it; with accelerators that give the place of a finished image to the next, a call
            of several batches waits for its slowest image once.
        image_size: side that images are resized to before they are rounded (bicubic, no antialiasing, as
            LlamaGen's published sampler does); None: as they are.
        rounding: to 8 bits, see `to_uint8`.
        dtype, device, threads, compiled: how the networks ran, which changes rounding; threads of a process, None on
            a GPU.
        versions: of varaccel and torch.
    """

    model: str
    weights: str
    accelerator: str
    options: dict[str, Any]
    call: dict[str, Any]
    source: str
    prompts: str
    count: int
    seed: int
    batch_size: int
    images_per_call: int = 0
    image_size: int | None = None
    rounding: Rounding = "nearest"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    compiled: bool = False
    versions: dict[str, str] = field(
        default_factory=lambda: {"varaccel": __version__, "torch": str(torch.__version__)}
    )

    def __post_init__(self) -> None:
        for name in ("count", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.images_per_call:  # runs of before this was a setting
            object.__setattr__(self, "images_per_call", self.batch_size)
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size must be at least 1, got {self.image_size}.")
        if self.rounding not in ("nearest", "down"):
            raise unknown_name("rounding", self.rounding, ("nearest", "down"))

    @classmethod
    def of(
        cls,
        pipe: Any,
        prompts: Sequence[str | int],
        accelerator: AnyAccelerator,
        *,
        model: str,
        source: str,
        call: Mapping[str, Any],
        **others: Any,
    ) -> Self:
        """The settings of a run of `pipe`.

        Args:
            prompts: one per image.
            others: further attributes.
        """
        if "batch_size" in others and (accelerator.continuous or isinstance(accelerator, Auto)):
            size = others["batch_size"]
            batches = max(1, min(BATCHES, len(prompts) // (CALLS * max(1, size))))
            others.setdefault("images_per_call", batches * size)
        # as they come back from a file
        plain = json.loads(json.dumps([accelerator.options(), dict(call)], default=str))
        device = pipe.transformer.device.type
        return cls(
            model=model,
            weights=weights_digest(pipe),
            accelerator=accelerator.name,
            options=plain[0],
            call=plain[1],
            source=source,
            prompts=text_digest([str(prompt) for prompt in prompts]),
            count=len(prompts),
            dtype=str(pipe.transformer.dtype).removeprefix("torch."),
            device=device,
            threads=torch.get_num_threads() if is_host(device) else None,
            **others,
        )

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self | None:
        """The settings of a folder, None if it holds no run.

        Raises:
            InputError: the file is damaged.
        """
        path = Path(folder) / SETTINGS
        if not path.exists():
            return None
        known = {f.name for f in fields(cls)}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} does not describe a run: {error}") from error
