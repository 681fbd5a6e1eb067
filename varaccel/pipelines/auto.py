"""One door to every model: the right pipeline for a name."""

from __future__ import annotations

import os
from typing import Any

from varaccel.errors import InputError

# importing a family makes its pipeline known
from varaccel.pipelines import chameleon, emu3, glm_image, imagegpt, infinity, janus, llamagen, mar, var
from varaccel.pipelines.base import TokenPipeline
from varaccel.pipelines.loading import LoadablePipeline
from varaccel.pipelines.published import load_named

PIPELINE_CLASSES = (
    llamagen.LlamaGenPipeline,
    var.VARPipeline,
    infinity.InfinityPipeline,
    mar.MARPipeline,
    janus.JanusPipeline,
    emu3.Emu3Pipeline,
    glm_image.GlmImagePipeline,
    chameleon.ChameleonPipeline,
    imagegpt.ImageGPTPipeline,
)
"""The library's own pipeline classes."""


class AutoPipeline:
    """Loads any model of the library, and of pipeline classes of one's own; not instantiated itself."""

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not instantiated; use AutoPipeline.from_pretrained(name).")

    @staticmethod
    def from_pretrained(
        name: str | os.PathLike[str], *, quantize: str | None = None, **options: Any
    ) -> LoadablePipeline:
        """Load a model.

        Args:
            name: a shipped model (`mini-llamagen`, `mini-var`), a published one (`llamagen-c2i-xl-384`,
                `var-d30`, `mar-base`: downloaded from the hub), a folder, or a hub repository in
                diffusers' layout, or in transformers' for models with image tokens (`deepseek-community/Janus-Pro-7B`).
                `varaccel models` lists the names. A bare name means the model of the list, also where there is a
                folder of that name (a warning says so); `./NAME`, `NAME/` and path objects mean the folder.
            quantize: "float16" for smaller weights on a processor, see `TokenPipeline.quantize`; None for those of the
                files.
            options: see `LoadablePipeline.from_pretrained`: `dtype=torch.bfloat16` or `dtype="bfloat16"`,
                `device_map`, settings such as `guidance_scale`, components, and those of the hub.

        Raises:
            CheckpointError: nothing there, or nothing that this library can load.
            InputError: an unknown option, number type or device.
        """
        pipe = load_named(name, **options)
        if quantize is not None:
            if not isinstance(pipe, TokenPipeline):
                raise InputError(f"a {type(pipe).__name__} has no quantize; leave it out.")
            pipe.quantize(quantize)
        return pipe
