"""Passes of a causal host over several tokens in the middle of an image, to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from varaccel.engine.pass_curve import Pass
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.session import CausalSession, DraftInputs

FILLED = 0.5
"""Share of the image's slots that hold something: the mean over a call."""


def causal_passes(job: CausalJob, tokens: Sequence[int], filled: float = FILLED) -> list[Pass]:
    """Passes over a chain of n tokens of every image, each with guidance, filter and draws, as verifying reads them.

    The cache is empty, but for attention counts as filled up to the chain: time does not depend on what is in it.

    Args:
        tokens: chain lengths; those that do not fit behind the filled part are left out.
        filled: share of the positions before the chain.
    """
    session = job.open_session()
    start = int(filled * job.canvas.num_positions)
    _ = session.prefix_features
    slots = session.cache_slots
    slots.usable[:, slots.base : slots.base + start] = True
    fitting = [count for count in tokens if start + count < job.canvas.num_positions]
    return [(count, partial(_read, job, session, start, count)) for count in fitting]


@torch.inference_mode()
def _read(job: CausalJob, session: CausalSession, start: int, count: int) -> torch.Tensor:
    positions = torch.arange(start, start + count, device=job.device).expand(job.canvas.batch, -1)
    drafts = DraftInputs(job.canvas.tokens.gather(1, positions), positions)
    features = session.read(drafts, length=start + count)
    following = positions + 1
    return job.randomness.sample(session.distribution(features, following), following)
