"""Continuous speculative decoding (CSpD): a small masked model drafts tokens, the large one verifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from varaccel.accelerators.fewer_steps import MaskedAccelerator
from varaccel.engine.accelerator import register
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.network import check_substitute
from varaccel.engine.options import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    positive_integer,
    settle,
)
from varaccel.errors import InputError
from varaccel.hosts.masked.denoising import Sampler
from varaccel.hosts.masked.job import MaskedJob
from varaccel.models.mar import MARTransformer
from varaccel.speculation.continuous_loop import Comparison, speculate_groups
from varaccel.speculation.continuous_rejection import ContinuousRule, ExactRule, PaperRule, ReferenceRule
from varaccel.speculation.group_verification import (
    GroupVerification,
    JointVerification,
    SequentialVerification,
)

Mode = Literal["reference", "paper", "exact"]
Verification = Literal["joint", "sequential"]


@register
@dataclass(frozen=True)
class CSpD(MaskedAccelerator):
    """A smaller model of the same tokens drafts, the model verifies several groups in one pass (arXiv 2411.11925).

    Modes:

    - "reference" is the published code (`ReferenceRule`). In effect it keeps a drafted token if it is close enough to
      the target's own one, and takes the target's otherwise. What is redrawn depends on the batch, as published.
    - "paper" is what is printed (`PaperRule`); tokens then carry the noise of their last step, without which they have
      no density. Real models accept next to nothing.
    - "exact" compares one denoising step that has noise (`ExactRule`, no factor for the steps before) and runs the
      steps after it with the target. Each token follows the target's distribution exactly, given what the
      target was shown.

    Verification:

    - "joint": one pass that sees none of the drafted tokens, as published. The target's distribution is then that of
      deciding the block at once: plain decoding with as many iterations fewer. The time does not depend on what is
      accepted.
    - "sequential": each group in sight of those before it, up to the first group with a rejection; one pass over
      `draft_length` canvases. With mode "exact" and `coupling_step=0` the images follow the distribution of
      plain decoding with `final_noise=True`. With a later step what later groups saw are drafts, not the
      tokens that took their place.

    Attributes:
        mode, verification: see above.
        draft_length: gamma, groups per block.
        prefill: share of the iterations, from the start, that the model decides itself.
        drafter: the small model: a `MARTransformer`, a pipeline that has one, the name of such a pipeline, or None for
            the one that came with the model.
        inner_temperature: see the rules; 42 in mode "reference", 1 in mode "paper" if None. Not for "exact".
        tries: candidates per token that is drawn again; 1000 in mode "exact", 100 otherwise if None.
        coupling_step: k of the denoising step that mode "exact" compares; tokens themselves, with their last step's
            noise, if 0.
        aligned: both models denoise a token with the same noise.
        iterations, head_steps, head_sampler: see `MaskedAccelerator`.

    Raises:
        InputError: options out of range or that do not belong to the mode.
    """

    name: ClassVar[str] = "cspd"
    summary: ClassVar[str] = "a smaller model drafts continuous tokens, the model keeps or replaces them"

    mode: Mode = "exact"
    draft_length: int = 4
    prefill: float = 0.05
    verification: Verification = "joint"
    drafter: object = None
    inner_temperature: float | None = None
    tries: int | None = None
    coupling_step: int = 1
    aligned: bool = True
    iterations: int | None = None
    head_steps: int | None = None
    head_sampler: Sampler | None = None

    @property
    def lossless(self) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("verification", self.verification, get_args(Verification))
        settle(
            self,
            draft_length=positive_integer("draft_length", self.draft_length),
            prefill=check_number("prefill, a share of the iterations,", self.prefill, most=1),
            coupling_step=check_integer("coupling_step", self.coupling_step, least=0),
            aligned=check_flag("aligned", self.aligned),
        )
        if self.mode == "exact" and self.inner_temperature is not None:
            raise InputError(
                "mode 'exact' has no inner_temperature: any but 1 would change the distribution."
            )
        if self.head_sampler not in (None, "ddpm"):
            raise _no_densities(self.head_sampler)
        self.rule()  # its options are checked where it is made

    def rule(self) -> ContinuousRule:
        """What keeps or replaces drafted tokens."""
        tries = {} if self.tries is None else {"tries": self.tries}
        if self.mode == "exact":
            return ExactRule(**tries)
        inner = {} if self.inner_temperature is None else {"inner_temperature": self.inner_temperature}
        kind: Any = ReferenceRule if self.mode == "reference" else PaperRule
        return kind(**tries, **inner)

    @property
    def compared_step(self) -> int:
        """k of the step whose Gaussians are compared."""
        return self.coupling_step if self.mode == "exact" else 0

    def run(self, job: MaskedJob) -> SpeculationStats:
        drafter = resolve_drafter(self.drafter, job)
        needs_density = self.mode != "reference" and self.compared_step == 0
        sampling = self.sampling(job, final_noise=True) if needs_density else self.sampling(job)
        if not sampling.noisy:
            raise _no_densities(sampling.sampler)
        if self.compared_step >= sampling.steps:
            raise InputError(
                f"coupling_step must be below the {sampling.steps} steps of the head, got {self.compared_step}."
            )
        target = job.open_session(sampling=sampling)
        draft = job.open_session(drafter, sampling=sampling)
        noise = job.randomness
        comparison = Comparison(
            self.rule(), self.compared_step, noise, noise if self.aligned else noise.other()
        )
        schedule = self.schedule(job)
        verification: GroupVerification
        if self.verification == "joint":
            verification = JointVerification(target, self.draft_length)
        else:
            contexts = job.open_session(sampling=sampling, contexts=self.draft_length)
            verification = SequentialVerification(contexts, schedule, self.draft_length)
        return speculate_groups(
            target,
            draft,
            job.canvas,
            schedule,
            comparison,
            verification,
            prefill=self.prefill,
            on_step=job.on_step,
        )


def _no_densities(sampler: str | None) -> InputError:
    return InputError(
        f"head_sampler {sampler!r} adds no noise, so draft and target have no densities to compare; use ddpm."
    )


def resolve_drafter(drafter: object, job: MaskedJob) -> MARTransformer:
    """The drafter's network, if its tokens and conditions are those of the job's.

    Args:
        drafter: a network, a pipeline, its name, or None for what came with the model.

    Raises:
        InputError: there is none, or it has another signature, or is on another device.
        CheckpointError: there is no model of that name.
    """
    chosen = job.resolve_network(drafter, "draft")
    if chosen is None:
        raise InputError(
            "this model came without a smaller one to draft with; pass one, as in CSpD(drafter=small_pipe)."
        )
    return check_substitute(chosen, job.network, "drafter")
