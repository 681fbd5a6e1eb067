"""Published models by name: their files from the hub, as pipelines."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from varaccel.errors import CheckpointError
from varaccel.nn.precision import cast
from varaccel.pipelines.catalog import PUBLISHED, PublishedModel
from varaccel.pipelines.loading import PIPELINES, LoadablePipeline, load_folder


def load_published(name: str, model: PublishedModel, dtype: Any = None, **hub: Any) -> LoadablePipeline:
    """Download a published model and build its pipeline.

    Args:
        dtype: number type of the networks that decide tokens; the image tokenizer stays in float32, as published.
        hub: for `hf_hub_download`, such as `revision`.

    Raises:
        CheckpointError: the files cannot be had, or do not fit.
    """
    families = {getattr(cls, "family", None): cls for cls in reversed(PIPELINES.values())}
    if model.family not in families:
        raise CheckpointError(f"{name!r} is a {model.family} model; load it with varaccel.AutoPipeline.")
    pipeline: Any = families[model.family]
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
        for network in (pipe.components["transformer"], pipe.components.get("refiner")):
            if network is not None:
                cast(network, dtype)
    return pipe


def load_named(name: str, **options: Any) -> LoadablePipeline:
    """The pipeline of a published model by name, or of whatever else `load_folder` finds by it.

    Raises:
        CheckpointError: nothing there, or nothing that this library can load.
    """
    if name in PUBLISHED:
        return load_published(name, PUBLISHED[name], **options)
    return load_folder(name, **options)


@lru_cache(maxsize=2)
def load_network(name: str, device: torch.device, dtype: torch.dtype) -> object:
    """The transformer of a pipeline, kept for the next call; None if it has none."""
    # loaded in that type, not cast to it: parts of some networks stay in float32
    network: Any = getattr(load_named(name, dtype=dtype), "transformer", None)
    return None if network is None else network.to(device)
