"""One door to every model: the right pipeline for a name."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from varaccel.errors import CheckpointError, unknown_name
from varaccel.nn.precision import cast
from varaccel.pipelines.catalog import PUBLISHED, PublishedModel
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.loading import LoadablePipeline, hub_options, pipeline_class_name, resolve_model
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.var import VARPipeline

PIPELINES: dict[str, type[LoadablePipeline]] = {
    "LlamaGenPipeline": LlamaGenPipeline,
    "MARPipeline": MARPipeline,
    "VARPipeline": VARPipeline,
}
"""Pipeline classes by the name that a model folder records."""


class AutoPipeline:
    """Loads any model of the library; not instantiated itself."""

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not instantiated; use AutoPipeline.from_pretrained(name).")

    @staticmethod
    def from_pretrained(name: str | os.PathLike[str], **options: Any) -> LoadablePipeline:
        """Load a model.

        Args:
            name: a shipped model (`mini-llamagen`, `mini-var`), a published one (`llamagen-c2i-xl-384`,
                `var-d30`, `mar-base`: downloaded from the hub), a folder, or a hub repository in diffusers' layout.
                `varaccel models` lists the names.
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
    pipeline: Any = {c.family: c for c in (LlamaGenPipeline, VARPipeline, MARPipeline)}[model.family]
    if model.revision is not None:
        hub = {"revision": model.revision, **hub}
    try:
        weights = hf_hub_download(model.repository, model.weights, **hub)
        image_tokenizer = hf_hub_download(
            model.tokenizer_repository or model.repository, model.tokenizer, **hub
        )
        refiner = hf_hub_download(model.repository, model.refiner, **hub) if model.refiner else None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} could not be downloaded from {model.repository} ({type(error).__name__}); "
            f"check the connection, or fetch the files and use {pipeline.__name__}.from_single_file."
        ) from error
    components: dict[str, Any] = dict(model.settings)
    if model.text_encoder is not None:
        from transformers import AutoTokenizer, T5EncoderModel

        components["tokenizer"] = AutoTokenizer.from_pretrained(model.text_encoder, **hub)
        components["text_encoder"] = T5EncoderModel.from_pretrained(model.text_encoder, dtype=dtype, **hub)
    else:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        components["class_names"] = [info.index_to_description(i) for i in range(info.num_classes())]
    if model.family == "llamagen":
        components["grid_size"] = model.grid_size
    elif refiner is not None:
        components["refiner"] = refiner
    components["vae" if model.family == "mar" else "vq_model"] = image_tokenizer
    pipe: LoadablePipeline = pipeline.from_single_file(weights, **components)
    if dtype is not None:
        # the image tokenizer stays in float32, as published
        for network in (pipe.components["transformer"], pipe.components.get("refiner")):
            if network is not None:
                cast(network, dtype)
    return pipe
