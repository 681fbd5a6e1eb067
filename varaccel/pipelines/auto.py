"""One door to every model: the right pipeline for a name."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from varaccel.errors import CheckpointError, unknown_name
from varaccel.pipelines.catalog import PUBLISHED, PublishedModel
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.loading import LoadablePipeline, hub_options, pipeline_class_name, resolve_model

PIPELINES: dict[str, type[LoadablePipeline]] = {"LlamaGenPipeline": LlamaGenPipeline}
"""Pipeline classes by the name that a model folder records."""


class AutoPipeline:
    """Loads any model of the library; not instantiated itself."""

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not instantiated; use AutoPipeline.from_pretrained(name).")

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], **options: Any) -> LoadablePipeline:
        """Load a model.

        Args:
            name: a shipped model (`mini-llamagen`), a published one (`llamagen-c2i-xl-384`: downloaded from
                its authors), a folder, or a hub repository in diffusers' layout. `varaccel models` lists
                the names.
            options: of `from_pretrained`, such as `dtype=torch.bfloat16`, or of the hub.

        Raises:
            CheckpointError: nothing there, or nothing that this library can load.
        """
        text = os.fspath(name)
        if text in PUBLISHED:
            return _from_published(text, PUBLISHED[text], **options)
        folder = resolve_model(name, **hub_options(options))
        class_name = pipeline_class_name(folder)
        if class_name not in PIPELINES:
            raise CheckpointError(str(unknown_name("pipeline class", class_name, PIPELINES)))
        return PIPELINES[class_name].from_pretrained(folder, **options)


def _from_published(name: str, model: PublishedModel, dtype: Any = None, **hub: Any) -> LoadablePipeline:
    try:
        weights = hf_hub_download(model.repository, model.weights, **hub)
        image_tokenizer = hf_hub_download(model.repository, model.tokenizer, **hub)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} could not be downloaded from {model.repository} ({type(error).__name__}); "
            "check the connection, or fetch the files and use LlamaGenPipeline.from_single_file."
        ) from error
    components: dict[str, Any] = {}
    if model.text_encoder is not None:
        from transformers import AutoTokenizer, T5EncoderModel

        components["tokenizer"] = AutoTokenizer.from_pretrained(model.text_encoder, **hub)
        components["text_encoder"] = T5EncoderModel.from_pretrained(model.text_encoder, dtype=dtype, **hub)
    else:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        components["class_names"] = [info.index_to_description(i) for i in range(info.num_classes())]
    pipe = LlamaGenPipeline.from_single_file(
        weights,
        vq_model=image_tokenizer,
        grid_size=model.grid_size,
        guidance_scale=model.guidance_scale,
        top_k=model.top_k,
        **components,
    )
    if dtype is not None:
        pipe.transformer.to(dtype=dtype)  # the image tokenizer stays in float32, as published
    return pipe
