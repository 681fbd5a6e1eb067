"""Published models by name: their files from the hub, as pipelines."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from varaccel.errors import CheckpointError
from varaccel.pipelines.catalog import PUBLISHED, PublishedModel
from varaccel.pipelines.load_options import LoadOptions
from varaccel.pipelines.loading import (
    PIPELINES,
    LoadablePipeline,
    is_path,
    load_folder,
    tell_of_namesake,
)


def load_published(name: str, model: PublishedModel, **options: Any) -> LoadablePipeline:
    """Download a published model and build its pipeline.

    Args:
        options: as of `LoadablePipeline.from_pretrained`. A number type is that of the networks that decide tokens
            and of the text encoder; the image tokenizer stays in float32, as published, unless it is named.

    Raises:
        CheckpointError: the files cannot be had, or do not fit.
        InputError: an option that published models do not have.
    """
    families = {getattr(cls, "family", None): cls for cls in reversed(PIPELINES.values())}
    if model.family not in families:
        raise CheckpointError(f"{name!r} is a {model.family} model; load it with varaccel.AutoPipeline.")
    pipeline: Any = families[model.family]
    chosen = LoadOptions.of(options)
    chosen.check_parts(pipeline)
    chosen.check_single_files(name)
    try:
        components = _fetched(model, chosen)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name!r} could not be downloaded from {model.repository} ({type(error).__name__}); "
            f"check the connection, or fetch the files and use {pipeline.__name__}.from_single_file."
        ) from error
    pipe: LoadablePipeline = pipeline.from_single_file(**components)
    chosen.apply(pipe)
    return pipe


def _fetched(model: PublishedModel, chosen: LoadOptions) -> dict[str, Any]:
    """Arguments of `from_single_file`: downloaded files, what was passed instead of them, and settings."""
    revision = {} if model.revision is None else {"revision": model.revision}
    hub = {**revision, **chosen.hub}
    elsewhere = {
        name: value for name, value in hub.items() if name != "revision"
    }  # a commit of one repository
    parts = {**model.settings, **chosen.parts}
    if model.weights.endswith("/"):
        # the commit's other files stay where they are
        whole = snapshot_download(model.repository, allow_patterns=f"{model.weights}*", **hub)
        parts["path"] = Path(whole) / model.weights
    else:
        parts["path"] = hf_hub_download(model.repository, model.weights, **hub)
    image_tokenizer = "vae" if model.family == "mar" else "vq_model"
    if image_tokenizer not in parts:
        own = model.tokenizer_repository is None
        parts[image_tokenizer] = hf_hub_download(
            model.tokenizer_repository or model.repository, model.tokenizer, **(hub if own else elsewhere)
        )
    if model.refiner is not None and "refiner" not in parts:
        parts["refiner"] = hf_hub_download(model.repository, model.refiner, **hub)
    if model.text_encoder is not None:
        from transformers import AutoTokenizer, T5EncoderModel

        if "tokenizer" not in parts:
            parts["tokenizer"] = AutoTokenizer.from_pretrained(model.text_encoder, **elsewhere)
        if "text_encoder" not in parts:
            parts["text_encoder"] = T5EncoderModel.from_pretrained(
                model.text_encoder, dtype=chosen.dtype_of("text_encoder"), **elsewhere
            )
    elif "class_names" not in parts:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        parts["class_names"] = [info.index_to_description(i) for i in range(info.num_classes())]
    if model.family == "llamagen":
        parts["grid_size"] = model.grid_size
    return parts


def load_named(name: str | os.PathLike[str], **options: Any) -> LoadablePipeline:
    """The pipeline of a published model by name, or of whatever else `load_folder` finds by it.

    Raises:
        CheckpointError: nothing there, or nothing that this library can load.
    """
    if not is_path(name) and name in PUBLISHED:
        tell_of_namesake(str(name), "published")
        return load_published(str(name), PUBLISHED[str(name)], **options)
    return load_folder(name, **options)


@lru_cache(maxsize=2)
def load_network(name: str, device: torch.device, dtype: torch.dtype) -> object:
    """The transformer of a pipeline, kept for the next call; None if it has none."""
    # loaded in that type, not cast to it: parts of some networks stay in float32
    network: Any = getattr(load_named(name, dtype=dtype), "transformer", None)
    return None if network is None else network.to(device)
