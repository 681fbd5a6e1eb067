"""One description of what each scale of a next-scale call costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

from varaccel.accelerators.plain import Plain
from varaccel.engine.accelerator import Accelerator, Plan, register
from varaccel.engine.counts import StageStats
from varaccel.engine.network import check_substitute
from varaccel.engine.options import as_integer, check_choice, check_integer, check_number, settle
from varaccel.errors import InputError
from varaccel.hosts.next_scale.importance import Criterion
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.hosts.next_scale.network import NextScaleNetwork
from varaccel.hosts.next_scale.plan import Pruning, SessionPlan
from varaccel.hosts.next_scale.planned import Course, Turn
from varaccel.nn.residual import Part

Value = TypeVar("Value")
ByScale = tuple[tuple[int, Value], ...]
"""Values of scales, as pairs of a scale's number and its value."""

Shares = float | tuple[float, ...]
Ends = tuple[int | None, int | None]


class PlannedAccelerator(Accelerator[ScaleJob]):
    """Base of accelerators that say what each scale costs."""

    job_type = ScaleJob

    @abstractmethod
    def course(self, job: ScaleJob) -> Course:
        """What each scale of a call costs.

        Raises:
            InputError: options that do not fit the model.
        """

    def plan(self, job: ScaleJob) -> Plan:
        """Plain decoding if nothing is left out."""
        course = self.course(job)
        if course.is_plain(job):
            return Plain().plan(job)
        return Plan(self, lambda: course.run(job))

    def run(self, job: ScaleJob) -> StageStats:
        return self.course(job).run(job)


@register
@dataclass(frozen=True)
class ScalePlan(PlannedAccelerator):
    """What each scale costs: which network draws it, for which rows, from how many tokens, in which pass.

    Every option is a published method or the heart of one, and they can be combined. Approximate, but for the cases
    that leave nothing out. Scales are numbered from 0, or from the end as in Python lists, so that one plan fits all
    aspect ratios: -1 is the last one. A number of scales may be negative, too: -2 means all but the last two.

    Attributes:
        refiner: a smaller model that draws the last scales, as in `CoDe`; None for the one that came with the model.
        draft_scales: how many scales the model itself draws; all of them if None.
        guided_scales: for how many scales the unconditional rows of guidance run; all if None. Later scales follow the
            conditional distribution alone.
        keep: of pruned scales, the share of tokens that run, above 0 to 1, such as {-2: 0.6, -1: 0.5} (FastVAR, arXiv
            2503.23367). Sub-layers choose the tokens themselves; the others get what the sub-layer added at the cached
            scale, averaged over their cells.
        cached_scale: a scale before the pruned ones; the one right before them if None.
        blocks: first block in which tokens are pruned, and the end, as in a slice; all if None.
        parts: sub-layers that are pruned, of "attention", "cross" and "ffn"; all if None.
        criterion: what is chosen by, "distance" for the squared distance from the mean (FastVAR), or "attention" for
            the attention that a token is given by those of its scale (in the manner of ToProVAR and ScaleKV). Tokens
            are judged at the cached scale then, keys at their own.
        stop: how many scales are decided; all if None. The others have no tokens, and the image is decoded from the
            feature map as it stands (SkipVAR and FastVAR leave out the last scales).
        cache: of scales, the share of keys that later scales see, above 0 to 1, or one share per layer, such as
            {-3: 0.25, -2: [1, 0.5, 0.25]} (in the manner of ScaleKV).
        together: how many of the last scales are decided in one pass, from the feature map as it stands before them
            (in the manner of LazyVAR).

    Raises:
        InputError: a value out of its range.
    """

    name: ClassVar[str] = "scale_plan"
    summary: ClassVar[str] = "each scale at its own price: network, rows, tokens, passes"

    refiner: object = None
    draft_scales: int | None = None
    guided_scales: int | None = None
    keep: Mapping[int, float] | ByScale[float] | None = None
    cached_scale: int | None = None
    blocks: Ends | None = None
    parts: tuple[Part, ...] | None = None
    criterion: Criterion = "distance"
    stop: int | None = None
    cache: Mapping[int, Shares] | ByScale[Shares] | None = None
    together: int = 1

    @property
    def lossless(self) -> bool:
        pruned = any(share < 1 for _, share in self._keep)
        smaller = any(
            min(shares if isinstance(shares, tuple) else (shares,)) < 1 for _, shares in self._cache
        )
        left_out = any(value is not None for value in (self.draft_scales, self.guided_scales, self.stop))
        return not (pruned or smaller or left_out or self.together > 1)

    def __post_init__(self) -> None:
        for name in ("draft_scales", "guided_scales", "stop", "cached_scale"):
            value = getattr(self, name)
            if value is not None:
                settle(self, **{name: scale_integer(name, value)})
        check_choice("criterion", self.criterion, get_args(Criterion))
        settle(
            self,
            keep=_by_scale("keep", self.keep, _token_share),
            cache=_by_scale("cache", self.cache, _key_shares),
            blocks=None if self.blocks is None else _slice_ends(self.blocks),
            parts=None if self.parts is None else _parts(self.parts),
            together=check_integer("together", self.together, off="1 = each scale in a pass of its own"),
        )

    @property
    def _keep(self) -> ByScale[float]:
        return self.keep or ()  # type: ignore[return-value]  # settled

    @property
    def _cache(self) -> ByScale[Shares]:
        return self.cache or ()  # type: ignore[return-value]  # settled

    def course(self, job: ScaleJob) -> Course:
        return self.course_of(job, self._turns(job))

    def course_of(self, job: ScaleJob, turns: tuple[Turn, ...]) -> Course:
        """What each scale of a call costs if the networks take these turns."""
        scales = job.num_scales
        stop = scale_count("stop", self.stop, scales)
        guided = scale_count("guided_scales", self.guided_scales, scales, least=0)
        if self.together > stop:
            raise InputError(f"together={self.together} scales in one pass, but {stop} are decided.")
        plan = SessionPlan(
            guided=guided if guided < stop and job.guidance.enabled and job.condition is not None else None,
            together=self.together,
            pruning=self._pruning(scales, stop, turns[-1].start, depths=_depths(job, turns)),
            cache=self._budgets(scales, stop, turns[-1].start, depths=_depths(job, turns)),
            criterion=self.criterion if self._cache else "distance",
        )
        joint = stop - self.together
        if turns[-1].start > joint and self.together > 1:
            raise InputError(
                f"the last {self.together} scales are decided together, so one network must draw them: set "
                f"draft_scales to at most {joint}."
            )
        if plan.guided is not None and joint < plan.guided:
            raise InputError(
                f"the last {self.together} scales are decided together, guided or not: set guided_scales to at most "
                f"{joint}, or to {stop}."
            )
        return Course(turns, stop, plan)

    def _turns(self, job: ScaleJob) -> tuple[Turn, ...]:
        drafted = scale_count("draft_scales", self.draft_scales, job.num_scales)
        if drafted >= scale_count("stop", self.stop, job.num_scales):
            return (Turn("draft"),)
        return Turn("draft"), Turn("refine", drafted, resolve_refiner(self.refiner, job))

    def _pruning(self, scales: int, stop: int, handover: int, depths: Sequence[int]) -> Pruning | None:
        """What is pruned; None if nothing is.

        Args:
            handover: first scale of the last network, 0 if there is one only.
        """
        keep = {_scale("keep", scale, scales): share for scale, share in self._keep if share < 1}
        if not keep:
            return None
        first, last, joint = min(keep), max(keep), stop - self.together
        if last >= stop:
            raise InputError(f"keep prunes scale {last}, but only the first {stop} scales are decided.")
        if self.together > 1 and last >= joint:
            raise InputError(
                f"keep prunes scale {last}, but scales are pruned in passes of their own, and those from {joint} "
                "on are decided together."
            )
        cached = first - 1 if self.cached_scale is None else _scale("cached_scale", self.cached_scale, scales)
        if not 0 <= cached < first:
            raise InputError(
                f"keep prunes scale {first}, which needs a cached scale before it to restore its other tokens from, "
                f"not {cached}."
            )
        if handover and not (last < handover or handover < cached):
            raise InputError(
                f"a smaller model takes over at scale {handover}, which it reads together with all before it; the "
                "cached and the pruned scales must all come before that one, or all after it."
            )
        blocks = (None, None) if self.blocks is None else self.blocks
        for depth in depths:
            if not range(*slice(*blocks).indices(depth)):
                raise InputError(f"blocks {list(blocks)} names none of the model's {depth} blocks.")
        return Pruning(keep, cached, blocks, self.parts or get_args(Part), self.criterion)

    def _budgets(
        self, scales: int, stop: int, handover: int, depths: Sequence[int]
    ) -> dict[int, float | tuple[float, ...]]:
        """The shares of keys that stay, of scales that do not keep all."""
        budgets: dict[int, float | tuple[float, ...]] = {}
        for scale, shares in self._cache:
            number = _scale("cache", scale, scales)
            if number >= stop - self.together:
                raise InputError(
                    f"cache names scale {number}, but no later pass looks at its keys, so they are not kept anyway."
                )
            if isinstance(shares, tuple):
                for depth in depths:
                    if len(shares) != depth:
                        raise InputError(
                            f"cache has {len(shares)} shares for scale {number}, but the model has {depth} "
                            "layers; give one number or one per layer."
                        )
            if handover and self.criterion == "attention" and number <= handover:
                raise InputError(
                    f"a smaller model reads scale {number} together with others, where nobody notes the attention that "
                    "keys are given; use criterion='distance'."
                )
            if (min(shares) if isinstance(shares, tuple) else shares) < 1:
                budgets[number] = shares
        return budgets


def resolve_refiner(refiner: object, job: ScaleJob) -> NextScaleNetwork:
    """The refiner's network, if it can take over from the job's.

    Args:
        refiner: a network, a pipeline, its name, or None for what came with the model.

    Raises:
        InputError: there is none, or it has another signature, or is on another device.
        CheckpointError: there is no model of that name.
    """
    chosen = job.resolve_network(refiner, "refiner")
    if chosen is None:
        raise InputError(
            "this model came without a refiner; pass one, as in CoDe(refiner=small_pipe, draft_scales=8)."
        )
    return check_substitute(chosen, job.network, "refiner")


def _depths(job: ScaleJob, turns: Sequence[Turn]) -> list[int]:
    """Blocks of the networks."""
    networks: list[Any] = [turn.network or job.network for turn in turns]
    return [len(network.blocks) for network in networks]


# -- options -------------------------------------------------------------------------------------------


def scale_integer(what: str, value: object) -> int:
    """A number of scales, or of a scale, as an integer; negative ones count from the end.

    Raises:
        InputError: no integer.
    """
    number = as_integer(value)
    if number is None:
        raise InputError(f"{what} must be an integer, negative ones from the end, got {value!r}.")
    return number


def _by_scale(what: str, given: object, check: Any) -> tuple[tuple[int, Any], ...] | None:
    """Values of scales from a mapping or from pairs; numbers of scales may be text, as in JSON."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else given
    if not isinstance(pairs, (str, bytes)):
        try:
            found = [(scale, value) for scale, value in pairs]  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            pass
        else:
            return tuple((_typed_scale(what, scale), check(what, value)) for scale, value in found)
    raise InputError(f"{what} gives scales and their values, such as {{-1: 0.5}}, got {given!r}.")


def _typed_scale(what: str, scale: object) -> int:
    if isinstance(scale, str) and scale.strip().removeprefix("-").isdecimal():
        return int(scale)
    return scale_integer(f"a scale of {what}", scale)


def _token_share(what: str, value: object) -> float:
    share = check_number(what, value, most=1, off="share of tokens; 1 = all")
    if share == 0:
        raise InputError(f"{what} must be above 0; to leave the last scales out as a whole, use stop.")
    return share


def _key_shares(what: str, value: object) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple)) and value:
        return tuple(_key_share(what, each) for each in value)
    return _key_share(what, value)


def _key_share(what: str, value: object) -> float:
    share = check_number(what, value, most=1, off="share of keys; 1 = all")
    if share == 0:
        raise InputError(f"{what} must be above 0: a scale keeps one key at least.")
    return share


def _slice_ends(value: object) -> Ends:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return tuple(None if end is None else scale_integer("an end of blocks", end) for end in value)  # type: ignore[return-value]
    raise InputError(f"blocks must be the first block and the end, such as (3, -4), got {value!r}.")


def _parts(value: object) -> tuple[Part, ...]:
    names = value if isinstance(value, (list, tuple)) else [value]
    for name in names:
        check_choice("a sub-layer of parts", name, get_args(Part))
    if not names:
        raise InputError(f"parts must name one sub-layer at least, of {', '.join(get_args(Part))}.")
    return tuple(dict.fromkeys(names))


def scale_count(what: str, value: int | None, scales: int, least: int = 1) -> int:
    """A number of leading scales, negative ones from the end; all if None.

    Raises:
        InputError: the model has fewer.
    """
    if value is None:
        return scales
    count = value + scales if value < 0 else value
    if not least <= count <= scales:
        raise InputError(
            f"{what} must be from {least} to the model's {scales} scales, or negative to count from the end, got "
            f"{value}."
        )
    return count


def _scale(what: str, value: int, scales: int) -> int:
    """The number of a scale."""
    if not -scales <= value < scales:
        raise InputError(
            f"{what} names scale {value}, but the model has {scales} scales, 0 to {scales - 1}, or {-scales} to -1."
        )
    return value % scales
