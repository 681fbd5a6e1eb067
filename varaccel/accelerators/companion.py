"""A second network for a call: given, named, or what came with the model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from varaccel.engine.job import Job


def companion(chosen: Any, name: str, job: Job) -> Any:
    """The network that an option of an accelerator means; not checked for fitting.

    Args:
        chosen: a network, a pipeline that has a `transformer`, the name of one as `AutoPipeline` takes it, or None for
            the job's drafter called `name`.

    Returns:
        the network, None if there is none.

    Raises:
        CheckpointError: there is no model of that name.
    """
    found = job.drafters.get(name) if chosen is None else chosen
    if isinstance(found, str):
        found = _named(found, job.device, job.dtype)
    return getattr(found, "transformer", found)


@lru_cache(maxsize=2)
def _named(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer of a pipeline, kept for the next call."""
    from varaccel.pipelines.auto import AutoPipeline  # pipelines import accelerators

    # loaded in that type, not cast to it: parts of some networks stay in float32
    network: Any = getattr(AutoPipeline.from_pretrained(name, dtype=dtype), "transformer", None)
    return None if network is None else network.to(device)
