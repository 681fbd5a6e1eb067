"""Passes of a next-scale host, to be timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from varaccel.engine.pass_curve import Pass
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.schedule import ScaleInputs
from varaccel.hosts.next_scale.session import ScaleSession


def scale_passes(job: ScaleJob) -> Iterator[Pass]:
    """The passes of a call, scale after scale; each must be run once, before the next is asked for."""
    session = job.open_session()
    try:
        for number, inputs in enumerate(job.schedule.step_inputs(job.canvas), 1):
            yield inputs.positions.numel(), partial(_decide, job, session, inputs, number)
    finally:
        session.close()


@torch.inference_mode()
def _decide(job: ScaleJob, session: ScaleSession, inputs: ScaleInputs, number: int) -> None:
    distribution = session.predict(job.canvas, inputs)
    job.canvas.write(inputs.positions, job.randomness.sample(distribution, inputs.positions), number)
