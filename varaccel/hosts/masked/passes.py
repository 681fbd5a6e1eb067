"""Passes of a masked host that decide several tokens of a half-decided image, to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from varaccel.engine.pass_curve import Pass
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.masked.schedule import MaskedInputs
from varaccel.hosts.masked.session import MaskedSession


def masked_passes(job: MaskedJob, tokens: Sequence[int], filled: float = 0.5) -> list[Pass]:
    """Passes that decide groups of n tokens of every image: the transformer over what is known, and the head.

    Args:
        tokens: sizes of groups; those that are more than is left are left out.
        filled: share of the positions that is known.
    """
    session = job.open_session()
    order = job.schedule.permutation.to(job.device)
    total = order.shape[1]
    left = total - int(filled * total)
    groups = {
        count: MaskedInputs(order[:, left - count : left], order[:, left:], max(1, left - count), 0)
        for count in tokens
        if count <= left
    }
    return [(count, partial(_decide, job, session, inputs)) for count, inputs in groups.items()]


@torch.inference_mode()
def _decide(job: MaskedJob, session: MaskedSession, inputs: MaskedInputs) -> torch.Tensor:
    return job.randomness.sample(session.predict(job.canvas, inputs), inputs.positions)
