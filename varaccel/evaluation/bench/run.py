"""Every accelerator of a grid on one model: passes, speed and quality against plain decoding.

Speed is measured per batch size as `measure_speed` does it. Quality is measured once per accelerator, on images of
the same prompts and seeds: prompt adherence, and the Fréchet distance from true images in the features of the scene
detector, which is no FID (see `varaccel.evaluation.metrics.frechet`). A report says of every difference to plain
decoding whether the noise of sampling explains it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb, sqrt
from statistics import fmean
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from tqdm import tqdm

from varaccel import Plain
from varaccel.accelerators import Accelerator, make_accelerator
from varaccel.cli.commands import parse_options
from varaccel.engine.statistics import call_label, telling
from varaccel.errors import InputError
from varaccel.evaluation.digests import text_digest, weights_digest
from varaccel.evaluation.metrics.adherence import Rate, score_adherence
from varaccel.evaluation.metrics.frechet import (
    FeatureStatistics,
    FrechetSpread,
    frechet_distance,
    frechet_spread,
    scene_features,
    scene_space,
)
from varaccel.evaluation.speed.call_speed import Measurement, measure_speed, naming
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.models.detector import SceneDetector
from varaccel.scenes.grammar import Caption
from varaccel.scenes.renderer import render
from varaccel.scenes.sampler import sample_scene

if TYPE_CHECKING:
    from rich.console import Group

DEFAULT_GRID = (
    "auto",
    "jacobi:window=8",
    "jacobi:window=16",
    "speculative:drafter=auto,tree=3",
    "speculative:drafter=auto,tree=5",
    "lantern:k=10,delta=0.2,tree=5",
    "lantern:k=10,multiplier=5,tree=5",
    "zipar:window=2",
    "zipar:window=4",
    "zipar:window=8",
    "zipar:window=12",
    "jacobi:window=8,row_window=8",
    "lantern:k=10,delta=0.2,tree=5,row_window=8",
)
"""What is compared with plain decoding of a raster model if nothing is asked for, as typed on a command line."""

_QUICK_HEAD = "head_steps=20,head_sampler=dpm++"

RELEASE_GRIDS: Mapping[str, tuple[str, ...]] = {
    "llamagen": (
        "jacobi:window=16",
        "speculative:drafter=auto,tree=3",
        "lantern:k=50,delta=0.4,tree=8",
        *(f"zipar:window={n}" for n in (8, 4, 2)),
    ),
    "var": (
        *(f"code:draft_scales={n},refiner=mini-var-small" for n in (6, 5, 4, 3)),
        "refiner:refiner=mini-var-small",
    ),
    "mar": (
        "fewer_steps:iterations=32",
        f"fewer_steps:iterations=32,{_QUICK_HEAD}",
        "feature_cache:refresh=4",
        "cspd:mode=exact",
    ),
}
"""What the report of a release compares with plain decoding of the shipped model of a family, as typed on a command
line: few enough for half an hour on a CPU core."""

_NARROW = 18
"""Letters of an accelerator's options in a line where there are many columns."""

SIGNIFICANT = 0.05
"""A difference in adherence is noise if chance makes one as large or larger more often than this."""

_REFERENCE_BATCH = 100
_REFERENCES: dict[tuple[str, tuple[int, ...]], FeatureStatistics] = {}


# -- the grid ------------------------------------------------------------------------------------------


def _pieces(text: str) -> list[str]:
    """`text` cut at its commas, except those within brackets or double quotes."""
    pieces, depth, quoted = [""], 0, False
    for index, letter in enumerate(text):
        if letter == '"' and text[index - 1 : index] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def parse_accelerator(text: str) -> Accelerator:
    """An accelerator as typed: `NAME` or `NAME:key=value,key=value`, such as `zipar:window=4,mode=published`.

    Values are JSON where they parse, so lists keep their commas: `name:tree=[1, 2, 3],k=100`.

    Raises:
        InputError: an unknown name or option, or a value that the accelerator refuses; quotes `text`.
    """
    name, _, options = text.partition(":")
    try:
        return make_accelerator(name.strip(), parse_options(_pieces(options)))
    except InputError as error:
        raise InputError(f"accelerator {text!r}: {error}") from error


def parse_grid(texts: Iterable[str]) -> list[Accelerator]:
    """The accelerators of several texts; see `parse_accelerator`."""
    return [parse_accelerator(text) for text in texts]


def default_grid(pipe: Any, drafter: str | None = None) -> tuple[str, ...]:
    """What is compared on this pipeline if nothing is asked for.

    For next-scale models that is CoDe at every hand-over; for masked ones their accelerators alone and together, and
    fewer steps, which all of them have to beat.

    Args:
        drafter: a model to draft for a masked one that came without; without any, nothing that drafts is compared.
    """
    if pipe.family == "mar":
        return _masked_grid(pipe, drafter)
    if pipe.family != "var":
        return DEFAULT_GRID
    scales = len(pipe.transformer.schedule)
    return (*(f"code:draft_scales={n}" for n in range(scales - 1, 0, -1)), "refiner")


def _masked_grid(pipe: Any, drafter: str | None) -> tuple[str, ...]:
    """The grid of a masked model; iterations are shares of its tokens, so that it suits every size."""
    tokens = pipe.transformer.num_tokens
    half, quarter, eighth = (max(1, tokens // n) for n in (2, 4, 8))
    quick = "head_sampler=dpm++,head_steps=20"
    grid = (
        *(f"fewer_steps:iterations={n}" for n in (half, quarter, eighth)),
        *(f"fewer_steps:head_steps={n}" for n in (50, 25)),
        *(f"fewer_steps:head_sampler=dpm++,head_steps={n}" for n in (20, 10)),
        *(f"fewer_steps:iterations={n},{quick}" for n in (quarter, eighth)),
        *(f"feature_cache:refresh={n}" for n in (2, 4, 8)),
        f"feature_cache:refresh=4,iterations={quarter}",
        f"feature_cache:refresh=4,{quick}",
        *(f"feature_cache:refresh={n},iterations={quarter},{quick}" for n in (2, 4)),
    )
    if "draft" not in pipe.drafters and drafter is None:
        return grid
    named = "" if "draft" in pipe.drafters else f",drafter={drafter}"
    lengths = [n for n in (2, 4, 8) if n <= tokens]
    return (
        *grid,
        *(
            f"cspd:mode={mode},draft_length={n}{named}"
            for mode in ("reference", "paper", "exact")
            for n in lengths
        ),
        f"cspd:mode=exact,draft_length={min(4, lengths[-1])},verification=sequential{named}",
    )


# -- what is found -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """Fréchet distance from the reference, `value`, and its spread over bootstrap resamples of the images."""

    value: float
    spread: FrechetSpread


@dataclass(frozen=True)
class Quality:
    """How good the images of one accelerator are.

    Attributes:
        adherence: rate of images that show all objects and relations of their captions.
        correct: which of them do, in the order of the captions.
        distance: of all images from the reference; None without a reference.
    """

    adherence: Rate
    correct: tuple[bool, ...]
    distance: Distance | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `correct` becomes a string of 0 and 1."""
        return asdict(self) | {"correct": "".join("01"[shown] for shown in self.correct)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        distance = values["distance"]
        return cls(
            Rate(**values["adherence"]),
            tuple(letter == "1" for letter in values["correct"]),
            distance and Distance(distance["value"], FrechetSpread(**distance["spread"])),
        )


@dataclass(frozen=True)
class Comparison:
    """Quality of one accelerator beside that of plain decoding, of the same prompts and seeds.

    Attributes:
        gained, lost: prompts that only this one, or only plain decoding, shows correctly.
        p: probability of a split at least as uneven if both are equally good: the exact two-sided sign test on
            the prompts where they differ (McNemar 1947). Not corrected for the number of accelerators.
        distance: difference of the Fréchet distances, positive if this one is further away; None without them.
        distance_noise: 2 (s² + s_plain²)^½ with the bootstrap standard deviations s: what the difference must
            exceed. On the wide side, because the same prompts make both distances move together.
    """

    gained: int
    lost: int
    p: float
    distance: float | None
    distance_noise: float | None

    @property
    def same_adherence(self) -> bool:
        """Whether noise explains the difference in adherence."""
        return self.p >= SIGNIFICANT

    @property
    def same_distance(self) -> bool | None:
        """Whether noise explains the difference in distance; None without distances."""
        if self.distance is None or self.distance_noise is None:
            return None
        return abs(self.distance) < self.distance_noise or self.distance == 0


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact binomial probability of a split of `gained` + `lost` at least as uneven, at even odds."""
    total = gained + lost
    tail = sum(comb(total, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(quality: Quality, plain: Quality) -> Comparison:
    """`quality` beside `plain`.

    Raises:
        InputError: they are of different numbers of images.
    """
    if len(quality.correct) != len(plain.correct):
        raise InputError(
            f"{len(quality.correct)} images cannot be compared with {len(plain.correct)}; judge equally many."
        )
    pairs = list(zip(quality.correct, plain.correct, strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    difference = noise = None
    if quality.distance is not None and plain.distance is not None:
        difference = quality.distance.value - plain.distance.value
        noise = 2 * sqrt(quality.distance.spread.std**2 + plain.distance.spread.std**2)
    return Comparison(gained, lost, sign_test(gained, lost), difference, noise)


@dataclass(frozen=True)
class Row:
    """Everything about one accelerator.

    Attributes:
        accelerator, options, lossless: see `Measurement`.
        speed: by batch size.
        quality: None if no images were judged (yet).
    """

    accelerator: str
    options: dict[str, Any]
    lossless: bool
    speed: dict[int, Measurement] = field(default_factory=dict)
    quality: Quality | None = None

    @property
    def label(self) -> str:
        return call_label(self.accelerator, self.options)

    @property
    def key(self) -> str:
        """The same for the same accelerator, also after a way through JSON."""
        return json.dumps([self.accelerator, self.options], sort_keys=True, default=str)

    @property
    def distribution(self) -> str:
        return "lossless" if self.lossless else "approximate"

    @classmethod
    def of(cls, accelerator: Accelerator) -> Self:
        """An empty row."""
        return cls(accelerator.name, accelerator.options(), accelerator.lossless)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `speed` becomes a list."""
        speed = []
        for batch, measured in sorted(self.speed.items()):
            own = asdict(measured) | {"median_seconds": measured.median_seconds}
            speed.append({"batch": batch} | {k: v for k, v in own.items() if k not in _ROW_FIELDS})
        return {
            "accelerator": self.accelerator,
            "options": self.options,
            "lossless": self.lossless,
            "speed": speed,
            "quality": self.quality and self.quality.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        own = {name: values[name] for name in _ROW_FIELDS}
        speed = {}
        for one in values["speed"]:
            kept = {k: v for k, v in one.items() if k not in ("batch", "median_seconds")}
            speed[int(one["batch"])] = Measurement.from_dict({**own, **kept})
        quality = values["quality"]
        return cls(**own, speed=speed, quality=quality and Quality.from_dict(quality))


_ROW_FIELDS = ("accelerator", "options", "lossless")


@dataclass(frozen=True)
class Settings:
    """What must be equal for rows to stand in one report.

    Attributes:
        model: its name.
        weights: digest of the pipeline's weights.
        dtype, machine: precision and place of the measurement.
        seed: of the first image.
        repeats: timed rounds.
        prompts: digest of the prompts that speed was measured on.
        images: judged per accelerator.
        captions: digest of what they were asked to show.
        reference: space, number and digest of the true images; None without distances.
        call: further arguments of the pipeline call.
        compiled: whether the networks were compiled.
    """

    model: str
    weights: str
    dtype: str
    machine: str
    seed: int
    repeats: int
    prompts: str
    images: int
    captions: str
    reference: str | None
    call: dict[str, Any]
    compiled: bool = False

    @property
    def place(self) -> str:
        """The machine, and how the model ran there unless it ran in float32 as it is."""
        how = [*([] if self.dtype == "float32" else [self.dtype]), *(["compiled"] if self.compiled else [])]
        return ", ".join([self.machine, *how])


@dataclass(frozen=True)
class BenchReport:
    """Rows of one run, plain decoding first.

    Attributes:
        settings: what was measured, and where.
        rows: one per accelerator.
        truth: quality of the true images of the captions: what adherence and distance of as many images can
            reach with this detector; None if they were not judged.
    """

    settings: Settings
    rows: tuple[Row, ...]
    truth: Quality | None = None

    @property
    def batches(self) -> list[int]:
        """The batch sizes that any row was measured on."""
        return sorted({batch for row in self.rows for batch in row.speed})

    @property
    def plain(self) -> Row:
        return self.rows[0]

    def against_plain(self, row: Row) -> Comparison | None:
        """`row` beside plain decoding; None for that itself, or if either was not judged."""
        if row is self.plain or row.quality is None or self.plain.quality is None:
            return None
        return compare(row.quality, self.plain.quality)

    def best(self, batch: int, *, lossless: bool) -> Row | None:
        """The fastest row of its kind at this batch that is faster than plain decoding and as good up to noise.

        A row that was not judged against plain decoding is never the best; neither is one whose adherence or
        distance differs by more than noise, for better or worse.

        Args:
            lossless: among the lossless ones, or else among the approximate ones.
        """
        good = []
        for row in self.rows:
            versus = self.against_plain(row)
            if row.lossless is not lossless or batch not in row.speed or versus is None:
                continue
            if row.speed[batch].speedup > 1 and versus.same_adherence and versus.same_distance is not False:
                good.append(row)
        return max(good, key=lambda row: row.speed[batch].speedup, default=None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON. `against_plain` repeats what follows from the rest."""
        rows = []
        for row in self.rows:
            versus = self.against_plain(row)
            rows.append(row.to_dict() | {"against_plain": versus and asdict(versus)})
        return {"settings": asdict(self.settings), "truth": self.truth and self.truth.to_dict(), "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made.

        Raises:
            InputError: it is not from there.
        """
        try:
            truth = values["truth"]
            return cls(
                Settings(**values["settings"]),
                tuple(Row.from_dict(row) for row in values["rows"]),
                truth and Quality.from_dict(truth),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"this is no report of `varaccel bench` that can be continued ({type(error).__name__}: {error})."
            ) from error

    # -- shown ---------------------------------------------------------------------------------------------

    @property
    def _shows_cache(self) -> bool:
        """Whether any row hands over between networks: then memory is part of what is traded."""
        return any("stages" in one.details for row in self.rows for one in row.speed.values())

    @property
    def _drafting(self) -> list[tuple[str, str]]:
        """Columns of what drafts cost and how many were kept: title and key, where any row has something there."""
        told = {key for row in self.rows for one in row.speed.values() for key in one.details}
        columns = (("drafter passes", "draft_passes"), ("kept", "kept"))
        return [(title, key) for title, key in columns if key in told]

    def speed_header(self) -> list[str]:
        """Titles of the columns of `speed_cells`."""
        header = ["accelerator", "distribution", "passes", "tokens per pass", "seconds", "speed-up (spread)"]
        header += [title for title, _ in self._drafting]
        return [*header, "cache (MB)"] if self._shows_cache else header

    def speed_cells(self, batch: int) -> list[list[str]]:
        """A line per row that was measured on this batch, under `speed_header`; the first cell may have lines."""
        lines = []
        for row in self.rows:
            if batch not in row.speed:
                continue
            one = row.speed[batch]
            low, high = one.speedup_spread
            spread = "" if row is self.plain else f" ({low:.2f} to {high:.2f})"
            lines.append(
                [
                    *(_call(row), row.distribution, f"{one.passes:.4g}", f"{one.tokens_per_pass:.2f}"),
                    *(f"{one.median_seconds:.3f}", f"{one.speedup:.2f}x{spread}"),
                    *(_drafted(one, key) for _, key in self._drafting),
                    *([f"{one.cache_bytes / 1e6:.3g}"] if self._shows_cache else []),
                ]
            )
        return lines

    def quality_header(self) -> list[str]:
        """Titles of the columns of `quality_cells`."""
        header = ["accelerator", "adherence (95 %)", "against plain"]
        return header if self.settings.reference is None else [*header, "distance (sd)", "against plain"]

    def quality_cells(self) -> list[list[str]]:
        """A line per judged row, then one of the true images if they were judged, under `quality_header`."""
        judged = [(_call(row), row.quality, self.against_plain(row)) for row in self.rows]
        lines = []
        for call, quality, versus in [*judged, ("true images", self.truth, None)]:
            if quality is None:
                continue
            rate = quality.adherence
            cells = [call, f"{100 * rate.share:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"]
            cells.append("-" if versus is None else _adherence_verdict(versus))
            if quality.distance is not None:
                cells.append(f"{quality.distance.value:.3g} ({quality.distance.spread.std:.2g})")
                cells.append("-" if versus is None else _distance_verdict(versus))
            lines.append(cells + ["-"] * (len(self.quality_header()) - len(cells)))
        return lines

    def notes(self) -> list[str]:
        """What the columns of quality mean."""
        notes = [
            f"Adherence: share of {self.settings.images} images that show all of their captions; +a -b: prompts "
            "that only the accelerator, or only plain decoding, shows correctly, and p of the exact sign test."
        ]
        if self.settings.reference is not None:
            notes.append(
                f"Distance: Fréchet distance in the feature space {self.settings.reference}; not FID, and comparable "
                "at the same number of images only; sd by bootstrap, noise is twice that of the difference."
            )
        return notes

    def table(self) -> Group:
        """Tables for a terminal of 80 columns: speed by batch size, then quality."""
        from rich import box
        from rich.console import Group
        from rich.table import Column, Table

        # as wide as the longest word, so that nothing is cut
        longest = max(len(line) for row in self.rows for line in _call(row).split("\n"))
        widths = {"passes": 6, "tokens per pass": 6, "seconds": 7, "accelerator": max(13, min(longest, 24))}
        timed = dict(widths)
        tight: dict[str, Any] = {}
        if self._drafting or self._shows_cache:  # more columns take their room from lines, margins and names
            timed |= {"accelerator": min(widths["accelerator"], _NARROW), "distribution": 11}
            timed |= {"drafter passes": 7, "kept": 5}
            tight = {"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False}
        parts: list[Any] = []
        for batch in self.batches:
            table = Table(
                *(Column(name, width=timed.get(name)) for name in self.speed_header()),
                title=f"{self.settings.model}, batch {batch}, {self.settings.repeats} rounds\n"
                f"{self.settings.place}",
                **tight,
            )
            for call, *cells in self.speed_cells(batch):
                table.add_row(broken_call(call, timed["accelerator"]), *cells)
            parts.append(table)
        if lines := self.quality_cells():
            header = [Column(name, width=widths.get(name)) for name in self.quality_header()]
            table = Table(*header, title=f"quality of {self.settings.images} images")
            for cells in lines:
                table.add_row(*cells)
            parts += [table, *self.notes()]
        return Group(*parts)

    def markdown(self) -> str:
        """The same tables in Markdown."""
        parts = []
        for batch in self.batches:
            title = f"Batch {batch}, median of {self.settings.repeats} rounds, {self.settings.place}:"
            parts += [title, _markdown(self.speed_header(), self.speed_cells(batch), left=2)]
        if lines := self.quality_cells():
            parts += [_markdown(self.quality_header(), lines, left=1), *self.notes()]
        return "\n\n".join(parts) + "\n"


def call_lines(accelerator: str, options: Mapping[str, Any]) -> str:
    """An accelerator and its telling options, one a line."""
    return "\n".join([accelerator, *(f"{k}={v}" for k, v in telling(accelerator, options).items())])


def _call(row: Row) -> str:
    return call_lines(row.accelerator, row.options)


def broken_call(call: str, width: int) -> str:
    """A call whose options go on in a new line if they are wider."""
    return "\n".join(
        line if len(line) <= width else line.replace("=", "=\n  ", 1) for line in call.split("\n")
    )


def _drafted(measured: Measurement, key: str) -> str:
    """The mean of `draft_passes` or `kept` over all rounds (and images) of a measurement."""
    told = measured.details.get(key, [])
    if key == "kept":
        shares = [share for images in told for share in images]
        return f"{100 * fmean(shares):.0f} %" if shares else "-"
    return f"{fmean(told):.4g}" if told else "-"


def _adherence_verdict(versus: Comparison) -> str:
    word = "within noise" if versus.same_adherence else "better" if versus.gained > versus.lost else "worse"
    return f"{word} (+{versus.gained} -{versus.lost}, p {_probability(versus.p)})"


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def _distance_verdict(versus: Comparison) -> str:
    if versus.distance is None:
        return "-"
    word = "within noise" if versus.same_distance else "closer" if versus.distance < 0 else "further"
    return f"{word} ({versus.distance:+.2g}, noise {versus.distance_noise:.2g})"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned to the left, the others to the right."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(_one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    rule = "|" + "|".join("---" if index < left else "---:" for index in range(len(header))) + "|"
    return "\n".join([line(header), rule, *(line(cells) for cells in lines)])


def _one_line(cell: str) -> str:
    first, *rest = cell.split("\n")
    return f"{first} {', '.join(rest)}".strip()


# -- true images -------------------------------------------------------------------------------------


def true_images(seeds: Iterable[int], size: int) -> list[Image.Image]:
    """The scenes of `seeds` as they are, `size` pixels a side."""
    return [Image.fromarray(render(sample_scene(seed), size).image) for seed in seeds]


def reference_statistics(
    detector: SceneDetector, seeds: Sequence[int], *, progress: bool = True
) -> FeatureStatistics:
    """Feature statistics of the true images of `seeds`, kept for the next call of this process."""
    key = (scene_space(detector), tuple(seeds))
    if key not in _REFERENCES:
        features = []
        with tqdm(
            total=len(seeds), desc="true images", unit="image", leave=False, disable=not progress
        ) as bar:
            for start in range(0, len(seeds), _REFERENCE_BATCH):
                part = seeds[start : start + _REFERENCE_BATCH]
                features.append(scene_features(detector, true_images(part, detector.config.image_size)))
                bar.update(len(part))
        if not features:
            raise InputError("a reference needs at least two scenes, got none.")
        _REFERENCES[key] = FeatureStatistics.from_features(torch.cat(features), key[0])
    return _REFERENCES[key]


def judge_images(
    detector: SceneDetector,
    images: Sequence[Image.Image],
    captions: Sequence[Caption],
    reference: FeatureStatistics | None = None,
) -> Quality:
    """Adherence of `images` to `captions`, and their distance from `reference` if there is one."""
    scored = score_adherence(detector, images, captions)
    distance = None
    if reference is not None:
        features, space = scene_features(detector, images), scene_space(detector)
        own = FeatureStatistics.from_features(features, space)
        distance = Distance(frechet_distance(reference, own), frechet_spread(reference, features, space))
    return Quality(scored.rates["correct"], tuple(v.correct for v in scored.verdicts), distance)


# -- the run -------------------------------------------------------------------------------------------


def run_bench(
    pipe: Any,
    accelerators: Sequence[Accelerator],
    *,
    prompts: Sequence[str | int],
    captions: Sequence[Caption] = (),
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    detector: SceneDetector | None = None,
    reference: FeatureStatistics | None = None,
    truth: Sequence[Image.Image] | None = None,
    seed: int = 0,
    model: str = "",
    compiled: bool = False,
    drawn_together: int = 10,
    finished: BenchReport | None = None,
    on_rows: Callable[[BenchReport], None] | None = None,
    progress: bool = True,
    **call: Any,
) -> BenchReport:
    """Measure accelerators against plain decoding: speed by batch size, then quality.

    All accelerators of a batch size are timed in turn; a ratio is taken within a round, so it stays fair if rows are
    added later (`finished`), when plain decoding is timed again beside them.

    Args:
        pipe: a pipeline; its own progress bar is left as it is.
        accelerators: to be compared; plain decoding is added in front, repetitions are dropped.
        prompts: for speed, at least the largest batch; up to `repeats` batches of them are used.
        captions: for quality, one image of each per accelerator; image i has seed `seed` + i. None: only speed.
        batches: images per timed call.
        repeats: timed rounds.
        detector: judges the images of `captions`.
        reference: statistics of true images to measure the distance from; none: no distances.
        truth: true images of `captions`, to be judged like the others.
        model: name for the report.
        compiled: whether `pipe.compile()` was called, for the report.
        drawn_together: images per call where quality is judged; a GPU is quicker with more. Which numbers an image
            is drawn with does not depend on it.
        finished: an earlier report of the same settings; what it holds is not measured again.
        on_rows: called with the report so far whenever rows have been added, to save it.
        progress: show a bar over the whole.
        call: further arguments of the pipeline call, such as guidance_scale.

    Raises:
        InputError: captions without a detector; `finished` is of other settings; an accelerator that cannot be used
            here, by its label.
    """
    if captions and detector is None:
        raise InputError("images are judged by a detector; pass one, or no captions.")
    if reference is not None and len(captions) == 1:
        raise InputError("a distance needs at least two images; judge more, or pass no reference.")
    if not batches or min(batches) < 1 or max(batches) > len(prompts):
        raise InputError(
            f"batches are 1 to as many images as there are prompts ({len(prompts)}), got {list(batches)}."
        )
    if drawn_together < 1:
        raise InputError(f"drawn_together must be at least 1, got {drawn_together}.")
    settings = Settings(
        model=model,
        weights=weights_digest(pipe),
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        machine=describe_machine(pipe.transformer.device),
        seed=seed,
        repeats=repeats,
        prompts=text_digest([str(prompt) for prompt in prompts]),
        images=len(captions),
        captions=text_digest([text.text for text in captions]),
        reference=None if reference is None or not captions else _describe(reference),
        call=call,
        compiled=compiled,
    )
    candidates = {Row.of(one).key: one for one in (Plain(), *accelerators)}
    rows = {key: Row.of(one) for key, one in candidates.items()}
    seen_truth: Quality | None = None
    if finished is not None:
        _check_settings(finished.settings, settings)
        rows |= {row.key: row for row in finished.rows}
        seen_truth = finished.truth

    def added() -> BenchReport:
        report = BenchReport(settings, tuple(rows.values()), seen_truth)
        if on_rows is not None:
            on_rows(report)
        return report

    untimed = {
        batch: [one for key, one in candidates.items() if batch not in rows[key].speed]
        for batch in dict.fromkeys(batches)
    }
    unjudged = [(key, one) for key, one in candidates.items() if captions and rows[key].quality is None]
    total = len(captions) * len(unjudged) + sum(
        batch * (repeats + 1) * len({Row.of(one).key for one in (Plain(), *todo)})
        for batch, todo in untimed.items()
        if todo
    )
    with tqdm(total=total, unit="image", disable=not progress, leave=False) as bar:
        for batch, todo in untimed.items():
            if not todo:
                continue
            bar.set_description(f"speed, batch {batch}")
            measured = measure_speed(
                pipe,
                prompts,
                todo,
                batch=batch,
                repeats=repeats,
                seed=seed,
                on_call=lambda _, batch=batch: bar.update(batch),  # type: ignore[misc]
                **call,
            )
            timed = [Plain(), *(one for one in todo if not isinstance(one, Plain))]
            for accelerator, one in zip(timed, measured.measurements, strict=True):
                row = rows[key := Row.of(accelerator).key]
                if batch not in row.speed:
                    # what was asked for names the row, whatever a call made of it
                    kept = replace(one, options=row.options, lossless=row.lossless)
                    rows[key] = replace(row, speed={**row.speed, batch: kept})
            added()
        if captions and detector is not None:
            if truth is not None and seen_truth is None:
                seen_truth = judge_images(detector, truth, captions, reference)
            for key, accelerator in unjudged:
                bar.set_description(f"images, {accelerator.name}")
                images = _draw(pipe, captions, accelerator, seed, drawn_together, bar.update, call)
                quality = judge_images(detector, images, captions, reference)
                rows[key] = replace(rows[key], quality=quality)
                added()
    return BenchReport(settings, tuple(rows.values()), seen_truth)


def _draw(
    pipe: Any,
    captions: Sequence[Caption],
    accelerator: Accelerator,
    seed: int,
    together: int,
    on_images: Callable[[int], Any],
    call: Mapping[str, Any],
) -> list[Image.Image]:
    """One image per caption; image i has seed `seed` + i, whatever is drawn together."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), together):
        texts = [text.text for text in captions[start : start + together]]
        with naming(accelerator):
            output = pipe(texts, accelerator=accelerator, seed=seed + start, **call)
        images += output.images
        on_images(len(texts))
    return images


def _check_settings(earlier: Settings, now: Settings) -> None:
    before, wanted = (json.loads(json.dumps(asdict(one), default=str)) for one in (earlier, now))
    other = [name for name in wanted if before[name] != wanted[name]]
    if other:
        named = ", ".join(f"{name} {before[name]!r} instead of {wanted[name]!r}" for name in other)
        raise InputError(f"the earlier report is of other settings, so it cannot be continued: {named}.")


def _describe(reference: FeatureStatistics) -> str:
    digest = hashlib.sha256(reference.mean.numpy().tobytes()).hexdigest()[:8]
    return f"{reference.space} of {reference.count} true images ({digest})"
