"""The images of the accelerators' pages: what the shipped models draw, and schematics of the methods.

    OMP_NUM_THREADS=1 python docs/accelerator_figures.py [--out docs/accelerators/images] [--only NAME ...]

Strips show the plain image, the accelerated one of the same prompt and seed, and which pass decided which token.
Prompts and seeds were chosen so that the plain image is right; what the accelerator makes of them was not chosen.
All files are the same in every run on one machine; they are written whole or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varaccel import AutoPipeline, CoDe, CSpD, FeatureCache, FewerSteps, Jacobi, Lantern, Speculative, ZipAR
from varaccel.cli.sheets import wrapped
from varaccel.evaluation.call_text import quality_label
from varaccel.files import atomic_path
from varaccel.pipelines.acceptance_map import pass_colors

GROUND, INK, FAINT = "#fbfbfd", "#1f2430", "#8a90a0"
BLUE, BLUE_LIGHT = "#2f62c9", "#c9dafb"
GREEN, GREEN_LIGHT = "#1f7a4a", "#bfe6cf"
ORANGE, ORANGE_LIGHT = "#b85c00", "#fbdcb5"
RED, RED_LIGHT = "#b3261e", "#f6c9c5"
GREY_LIGHT = "#e3e5eb"


# -- what the models draw ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A plain and an accelerated image of one prompt and seed, and the acceptance map of the latter."""

    model: str
    prompt: str
    seed: int
    label: str
    accelerator: Any
    call: dict[str, Any] = field(default_factory=dict)


CONE = {"model": "mini-llamagen", "prompt": "a large green cone", "seed": 13}
PAIR = {
    "model": "mini-mar",
    "prompt": "a big shiny cyan cone to the left of a small orange cone on a blue floor",
    "seed": 0,
}
COMPARISONS = {
    "jacobi": Comparison(**CONE, label="Jacobi, window 16", accelerator=Jacobi(window=16)),
    "speculative": Comparison(**CONE, label="EAGLE, chain of 8", accelerator=Speculative("eagle", tree=8)),
    "lantern": Comparison(**CONE, label="k = 50, delta = 0.4", accelerator=Lantern(k=50, delta=0.4, tree=8)),
    "zipar": Comparison(**CONE, label="ZipAR, window 8", accelerator=ZipAR(window=8)),
    "fewer_steps": Comparison(
        **PAIR,
        label="32 iterations",
        accelerator=FewerSteps(iterations=32),
    ),
    "feature_cache": Comparison(**PAIR, label="refresh 4", accelerator=FeatureCache(refresh=4)),
    "cspd": Comparison(**PAIR, label="exact, blocks of 4", accelerator=CSpD()),
}

SIDE, GAP, MARGIN, TEXT = 256, 14, 16, 25


@lru_cache(maxsize=3)
def pipeline(name: str) -> Any:
    pipe = AutoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache(maxsize=8)
def plain(model: str, prompt: str, seed: int) -> Any:
    return pipeline(model)(prompt, seed=seed)


def passes(stats: Any) -> str:
    drafted = f" + {stats.draft_passes}" if stats.draft_passes else ""
    return f"{stats.passes}{drafted} passes"


@dataclass(frozen=True)
class Panel:
    """An image with the lines below it; `bar` puts a bar of the colours of that many passes on the second line."""

    image: Image.Image
    lines: Sequence[str]
    bar: int = 0
    frame: str | None = None


def sheet(title: str, panels: Sequence[Panel], columns: int, side: int = SIDE) -> Image.Image:
    """Panels in rows under a title."""
    font = ImageFont.load_default(TEXT)
    step = TEXT + 7
    text_height = step * max(len(p.lines) for p in panels) + 6
    rows = -(-len(panels) // columns)
    width = 2 * MARGIN + columns * side + (columns - 1) * GAP
    lines = wrapped(title, font, width - 2 * MARGIN)
    head = step * len(lines) + 8
    height = 2 * MARGIN + head + rows * (side + text_height) + (rows - 1) * GAP
    image = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * step), line, INK, font)
    for index, panel in enumerate(panels):
        left = MARGIN + index % columns * (side + GAP)
        top = MARGIN + head + index // columns * (side + text_height + GAP)
        image.paste(panel.image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        if panel.frame is not None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=panel.frame, width=7)
        for number, line in enumerate(panel.lines):
            y = top + side + 8 + number * step
            if panel.bar and number == 1:
                colors = pass_colors(1 + np.arange(side) * panel.bar // side, panel.bar)
                bar = Image.fromarray(colors[None]).resize((side, TEXT - 4), Image.Resampling.NEAREST)
                image.paste(bar, (left, y + 3))
            elif panel.bar and number == 2:
                draw.text((left, y), "pass 1", INK, font)
                draw.text((left + side, y), line, INK, font, anchor="ra")
            else:
                draw.text((left + side // 2, y), line, INK, font, anchor="ma")
    return image


def passes_map(output: Any) -> Panel:
    total = output.stats.passes
    image = output.acceptance_maps(size=SIDE, overlay=True, legend=False)[0]
    return Panel(image, ("when tokens came", "", str(total)), bar=total)


def title(model: str, prompt: str, seed: int) -> str:
    return f"{model}, “{prompt}”, seed {seed}"


def strip(name: str) -> Image.Image:
    """Plain, accelerated, and which pass decided which token."""
    case = COMPARISONS[name]
    before = plain(case.model, case.prompt, case.seed)
    after = pipeline(case.model)(case.prompt, seed=case.seed, accelerator=case.accelerator, **case.call)
    panels = [
        Panel(before.images[0], ("plain", passes(before.stats), quality_label(before.stats.lossless))),
        Panel(after.images[0], (case.label, passes(after.stats), quality_label(after.stats.lossless))),
        passes_map(after),
    ]
    return sheet(title(case.model, case.prompt, case.seed), panels, 3)


def families() -> Image.Image:
    """Plain decoding of the three shipped models."""
    prompt, seed = CONE["prompt"], CONE["seed"]
    outputs = {name: plain(name, prompt, seed) for name in ("mini-llamagen", "mini-var", "mini-mar")}
    orders = ("token by token", "scale by scale", "random groups")
    panels = [
        Panel(out.images[0], (name, f"{out.stats.passes} passes", order))
        for (name, out), order in zip(outputs.items(), orders, strict=True)
    ]
    return sheet(f"“{prompt}”, seed {seed}, plain decoding", panels, 3)


def same_image() -> Image.Image:
    """What `auto` chooses from draws one image: the seed's."""
    pipe = pipeline("mini-llamagen")
    choices = {
        "one token per pass": Jacobi(window=1, coupling="gumbel"),
        "Jacobi, window 5": Jacobi(window=5, coupling="gumbel"),
        "EAGLE, chain of 4": Speculative("eagle", tree=4, verification="gumbel"),
    }
    panels = []
    for label, accelerator in choices.items():
        out = pipe(CONE["prompt"], seed=CONE["seed"], accelerator=accelerator)
        panels.append(Panel(out.images[0], (label, passes(out.stats), quality_label(out.stats.lossless))))
    if any(p.image.tobytes() != panels[0].image.tobytes() for p in panels):
        raise RuntimeError("the three images are not equal.")
    return sheet(title(**CONE) + ": what Auto chooses from", panels, 3)


def scales() -> Image.Image:
    """The scales of a VAR image as they arrive, four by the model and the rest by the refiner."""
    pipe = pipeline("mini-var")
    prompt, seed, drafted = CONE["prompt"], CONE["seed"], 4
    sides = pipe.transformer.schedule.sides
    shown: list[Image.Image] = []

    def watch(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        shown.append(state["preview"]()[0])

    pipe(
        prompt,
        seed=seed,
        accelerator=CoDe("mini-var-small", draft_scales=drafted),
        callback_on_step_end=watch,
    )
    panels = [
        Panel(
            image,
            (f"scale {index + 1}, side {side}", "mini-var" if index < drafted else "refiner"),
            frame=BLUE if index < drafted else "#ff8c1a",
        )
        for index, (side, image) in enumerate(zip(sides, shown, strict=True))
    ]
    panels.append(
        Panel(plain("mini-var", prompt, seed).images[0], ("without CoDe:", "all mini-var"), frame=BLUE)
    )
    return sheet(f"“{prompt}”, seed {seed}: scale after scale", panels, 4, side=192)


# -- schematics ----------------------------------------------------------------------------------------------------


class Drawing:
    """A small SVG image on a ground of its own, so that it can be read in light and dark palettes.

    Its text is 15 units high and its width 420 units, about the width of a phone.
    """

    width = 420

    def __init__(self, height: int, description: str) -> None:
        self.height, self.description = height, description
        self.parts: list[str] = []

    def cell(self, x: float, y: float, size: float, fill: str, text: str = "", ink: str = INK) -> None:
        self.box(x, y, size, size, fill)
        if text:
            self.text(x + size / 2, y + size / 2, text, ink=ink, size=min(15, round(size * 0.56)))

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        stroke: str = "#ffffff",
        radius: float = 3,
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.5"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        ink: str = INK,
        size: int = 15,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central" font-size="{size}" '
            f'fill="{ink}"{weight}>{escape(text)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, ink: str = FAINT, arrow: bool = False) -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{ink}" stroke-width="2"{end}/>'
        )

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]], step: float = 22) -> None:
        for index, (fill, text) in enumerate(entries):
            self.box(x, y + index * step, 15, 15, fill, FAINT)
            self.text(x + 23, y + index * step + 8, text, anchor="start", size=14)

    def svg(self) -> str:
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif">\n'
            f"<title>{escape(self.description)}</title>\n"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{FAINT}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{GROUND}"/>\n{body}\n</svg>\n'
        )


def shade(share: float) -> str:
    """A blue that darkens from 0 to 1."""
    light, dark = (228, 237, 253), (88, 134, 226)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(light, dark, strict=True))


def masked_groups(count: int, side: int, borders: Sequence[int]) -> list[int]:
    """The group of each of `side`² positions of a random order; groups end where `borders` says (tokens left)."""
    order = np.random.default_rng(3).permutation(side * side)
    groups = [0] * (side * side)
    for group in range(count):
        for place in order[side * side - borders[group] : side * side - borders[group + 1]]:
            groups[int(place)] = group
    return groups


def draw_plain() -> Drawing:
    d = Drawing(
        196, "Raster order: one token per pass. Scales: one map per pass. Masked: one random group per pass."
    )
    size, side = 24, 5
    for index in range(side * side):
        row, column = divmod(index, side)
        d.cell(12 + column * size, 40 + row * size, size, shade(index / 24), str(index + 1))
    d.text(72, 20, "LlamaGen", bold=True)
    d.text(72, 178, "a token a pass", size=14)
    left, top = 152, 40
    for number, (cells, width, x, y) in enumerate([(1, 22, 0, 0), (2, 22, 40, 0), (4, 18, 12, 52)]):
        for index in range(cells * cells):
            row, column = divmod(index, cells)
            d.cell(
                left + x + column * width, top + y + row * width, width, shade(number / 2), str(number + 1)
            )
    d.text(206, 20, "VAR", bold=True)
    d.text(206, 178, "a scale a pass", size=14)
    from varaccel.hosts.masked.schedule import cosine_borders

    groups = masked_groups(5, side, cosine_borders(25, 5))
    for index, group in enumerate(groups):
        row, column = divmod(index, side)
        d.cell(288 + column * size, 40 + row * size, size, shade(group / 4), str(group + 1))
    d.text(348, 20, "MAR", bold=True)
    d.text(348, 178, "a group a pass", size=14)
    return d


def draw_jacobi() -> Drawing:
    d = Drawing(
        252,
        "A window of five positions is read in every pass; accepted draft tokens are decided, the window moves on.",
    )
    size, left = 34, 72
    # per pass: decided before, accepted, redrawn; the rest of the window are the new answers
    states = [(1, 3, 1), (5, 2, 1), (8, 1, 1)]
    window = 5
    for row, (done, kept, redrawn) in enumerate(states):
        y = 20 + row * 52
        d.text(left - 10, y + size / 2, f"pass {row + 2}", anchor="end")
        for column in range(10):
            x = left + column * size
            if column < done:
                d.cell(x, y, size - 2, BLUE_LIGHT, "")
            elif column < done + kept:
                d.cell(x, y, size - 2, GREEN_LIGHT, "✓")
            elif column < done + kept + redrawn:
                d.cell(x, y, size - 2, ORANGE_LIGHT, "✗")
            elif column < done + window:
                d.cell(x, y, size - 2, GREY_LIGHT, "?")
            else:
                d.box(x, y, size - 2, size - 2, "none", GREY_LIGHT)
        width = min(10, done + window) - done
        d.parts.append(
            f'<rect x="{left + done * size - 3:g}" y="{y - 3:g}" width="{width * size + 4:g}" height="{size + 4:g}" '
            f'rx="5" fill="none" stroke="{BLUE}" stroke-width="2.5"/>'
        )
    d.legend(12, 180, [(GREEN_LIGHT, "✓ accepted"), (ORANGE_LIGHT, "✗ replaced: last one decided")])
    d.legend(252, 180, [(GREY_LIGHT, "? new draft token"), (BLUE_LIGHT, "decided before")])
    d.text(12, 236, "frame: the window that one pass of the model reads", anchor="start", size=14)
    return d


def draw_zipar() -> Drawing:
    window, rows, columns = 3, 5, 8
    d = Drawing(
        250,
        "Numbers are passes: every row runs three tokens behind the row above.",
    )
    size, left, top, now = 36, 70, 18, 8
    for row in range(rows):
        d.text(left - 10, top + row * size + size / 2, f"row {row + 1}", anchor="end")
        for column in range(columns):
            number = 1 + column + row * window
            fill = ORANGE_LIGHT if number == now else BLUE_LIGHT if number < now else GREY_LIGHT
            d.cell(left + column * size, top + row * size, size - 2, fill, str(number))
    total = columns + (rows - 1) * window
    d.text(12, 214, f"window 3: {total} passes instead of {rows * columns};", anchor="start")
    d.text(12, 235, "pass 8 (orange) decides three tokens", anchor="start")
    return d


def draw_speculative() -> Drawing:
    d = Drawing(
        292, "The drafter proposes a tree below the last token; one pass of the model verifies all of it."
    )
    node, kept, gone = 30, (GREEN_LIGHT, GREEN), (RED_LIGHT, RED)
    places = {
        "root": (50, 110),
        "a": (150, 60),
        "b": (150, 160),
        "aa": (250, 30),
        "ab": (250, 90),
        "ba": (250, 160),
        "aba": (350, 90),
    }
    edges = [("root", "a"), ("root", "b"), ("a", "aa"), ("a", "ab"), ("b", "ba"), ("ab", "aba")]
    accepted = {"a", "ab"}
    for one, other in edges:
        d.line(*places[one], *places[other], GREEN if other in accepted else FAINT)
    for name, (x, y) in places.items():
        fill, ink = (BLUE_LIGHT, BLUE) if name == "root" else kept if name in accepted else gone
        d.parts.append(
            f'<circle cx="{x}" cy="{y}" r="{node / 2 + 3}" fill="{fill}" stroke="{ink}" stroke-width="2"/>'
        )
        d.text(x, y, "•" if name == "root" else "✓" if name in accepted else "✗", ink=ink, size=17)
    d.text(50, 146, "last", size=14)
    d.text(50, 163, "token", size=14)
    d.text(250, 204, "draft tokens: 6, read in one pass", size=15)
    d.legend(12, 226, [(GREEN_LIGHT, "✓ accepted: two, and one more"), (RED_LIGHT, "✗ rejected")])
    d.text(12, 276, "one more: drawn from the model's distribution after the last ✓", anchor="start", size=13)
    return d


def draw_lantern() -> Drawing:
    d = Drawing(
        236,
        "A draft token is verified with the probability of its nearest tokens added to its own, up to a bound.",
    )
    base = 160
    bars = [("draft", 30, GREEN), ("1st", 26, BLUE), ("2nd", 18, BLUE), ("3rd", 34, GREY_LIGHT)]
    for index, (label, height, fill) in enumerate(bars):
        x = 20 + index * 48
        d.box(x, base - height, 34, height, fill, "none", 2)
        d.text(x + 17, base + 14, label, size=14)
    d.text(112, base + 36, "nearest tokens", size=14)
    d.text(100, 20, "what the model says", bold=True)
    d.line(216, 110, 250, 110, FAINT, arrow=True)
    x = 300
    heights = [(30, GREEN), (26, BLUE), (18, BLUE)]
    y: float = base
    for height, fill in heights:
        y -= height
        d.box(x, y, 44, height, fill, GROUND, 2)
    d.parts.append(
        f'<line x1="{x - 22}" x2="{x + 66}" y1="{base - 88}" y2="{base - 88}" stroke="{ORANGE}" stroke-width="2.5" '
        'stroke-dasharray="6 4"/>'
    )
    d.text(x + 22, base - 104, "bound", ink=ORANGE)
    d.text(x + 22, base + 14, "draft", size=14)
    d.text(x + 22, 20, "what verifies it", bold=True)
    d.text(12, 220, "the third would break the bound and is left out", anchor="start", size=14)
    return d


def draw_code() -> Drawing:
    d = Drawing(232, "The model draws the coarse scales, a smaller network the fine ones.")
    sides = [1, 2, 3, 4, 5, 6, 8]
    x: float = 12
    for index, side in enumerate(sides):
        cell = 10
        large = index < 4
        width = side * cell
        for row in range(side):
            for column in range(side):
                d.box(
                    x + column * cell,
                    128 - width + row * cell,
                    cell,
                    cell,
                    BLUE_LIGHT if large else ORANGE_LIGHT,
                    "#ffffff",
                    1,
                )
        d.text(x + width / 2, 144, str(index + 1), size=14)
        x += width + 14
        if index == 3:
            border = x - 7
    d.parts.append(
        f'<line x1="{border}" x2="{border}" y1="20" y2="150" stroke="{INK}" stroke-width="2" stroke-dasharray="5 4"/>'
    )
    d.text(border, 12, "hand-over", size=14)
    d.text((12 + border) / 2, 168, "the model", ink=BLUE, bold=True)
    d.text((border + 408) / 2, 168, "the refiner", ink=ORANGE, bold=True)
    d.text(12, 196, "The refiner reads scales 1 to 4 and draws 5 in one pass;", anchor="start", size=14)
    d.text(12, 215, "the model's cache is freed before.", anchor="start", size=14)
    return d


def draw_fewer_steps() -> Drawing:
    from varaccel.hosts.masked.schedule import cosine_borders

    d = Drawing(248, "The same random order in nine groups and in three: a group is decided in one pass.")
    side, size = 6, 26
    for left, count in ((24, 9), (240, 3)):
        groups = masked_groups(count, side, cosine_borders(side * side, count))
        for index, group in enumerate(groups):
            row, column = divmod(index, side)
            d.cell(
                left + column * size, 38 + row * size, size - 1, shade(group / (count - 1)), str(group + 1)
            )
        d.text(left + side * size / 2, 20, f"{count} iterations", bold=True)
    d.text(12, 212, "numbers are passes; groups grow, since late tokens", anchor="start", size=14)
    d.text(12, 231, "are settled by the early ones", anchor="start", size=14)
    return d


def draw_feature_cache() -> Drawing:
    d = Drawing(
        224,
        "Every fourth pass reads all tokens; the others read only what changed and what is asked for.",
    )
    base = 150
    for index in range(9):
        x = 20 + index * 43
        full = index % 4 == 0
        d.box(x, base - 106, 32, 106, GREY_LIGHT, "none", 3)
        height = 106 if full else 24
        d.box(x, base - height, 32, height, BLUE if full else ORANGE, "none", 3)
        d.text(x + 16, base + 14, str(index + 1), size=14)
    d.text(210, 20, "refresh 4: tokens that each pass reads", bold=True)
    d.legend(12, 180, [(BLUE, "all of them"), (ORANGE, "new and asked for")])
    d.legend(200, 180, [(GREY_LIGHT, "not read: keys and values")])
    d.text(223, 210, "of the last full pass", anchor="start", size=14)
    return d


def draw_cspd() -> Drawing:
    d = Drawing(
        250,
        "The small model drafts four groups of tokens in turn; one pass of the model verifies them.",
    )
    d.text(12, 20, "drafter, 4 passes", anchor="start", bold=True)
    for index in range(4):
        x = 24 + index * 98
        for token in range(3):
            d.cell(x + token * 24, 38, 23, ORANGE_LIGHT, "~")
        d.text(x + 36, 76, f"group {index + 1}", size=14)
        if index < 3:
            d.line(x + 76, 50, x + 94, 50, FAINT, arrow=True)
    d.line(210, 88, 210, 106, FAINT, arrow=True)
    d.text(12, 122, "model, 1 pass", anchor="start", bold=True)
    marks = ["✓✗✗", "✗✓✗", "✗✗✗", "✗✗✓"]
    for index, row in enumerate(marks):
        x = 24 + index * 98
        for token, mark in enumerate(row):
            d.cell(
                x + token * 24,
                140,
                23,
                GREEN_LIGHT if mark == "✓" else BLUE_LIGHT,
                mark if mark == "✓" else "p",
            )
    d.legend(
        12,
        182,
        [(GREEN_LIGHT, "✓ kept: the draft's values"), (BLUE_LIGHT, "p: drawn from the model instead")],
    )
    d.text(12, 236, "compared: the Gaussians of one step of denoising", anchor="start", size=14)
    return d


def draw_auto() -> Drawing:
    d = Drawing(310, "How Auto chooses for LlamaGen: by the time that passes over several tokens take.")

    def node(x: float, y: float, width: float, lines: Sequence[str], fill: str, ink: str) -> None:
        d.box(x, y, width, 22 * len(lines) + 10, fill, ink, 6)
        for index, line in enumerate(lines):
            d.text(x + width / 2, y + 16 + 22 * index, line, size=14)

    node(
        40,
        12,
        340,
        ["in the first call: passes over 1, 4 and 16", "tokens, and with a small drafter, are timed"],
        GREY_LIGHT,
        FAINT,
    )
    node(
        40,
        104,
        340,
        ["seconds of a pass / tokens that it decides,", "on record by window and chain"],
        BLUE_LIGHT,
        BLUE,
    )
    node(12, 210, 124, ["no 10 % gain:", "one token"], GREEN_LIGHT, GREEN)
    node(148, 210, 124, ["least: Jacobi,", "its window"], GREEN_LIGHT, GREEN)
    node(284, 210, 124, ["least: drafter,", "its chain"], GREEN_LIGHT, GREEN)
    d.line(210, 66, 210, 102, FAINT, arrow=True)
    for x in (74, 210, 346):
        d.line(x, 158, x, 208, FAINT, arrow=True)
    d.text(12, 288, "all three draw the same image for a seed", anchor="start", size=14)
    return d


def favicon() -> Drawing:
    d = Drawing(420, "varaccel")
    for row in range(3):
        for column in range(3):
            d.box(30 + column * 124, 30 + row * 124, 112, 112, shade((row * 3 + column) / 8), "none", 18)
    return d


IMAGES: dict[str, Callable[[], Image.Image]] = {
    "plain": families,
    "auto": same_image,
    "code": scales,
    **{name: (lambda name=name: strip(name)) for name in COMPARISONS},  # type: ignore[misc]
}
SCHEMATICS: dict[str, Callable[[], Drawing]] = {
    "plain-order": draw_plain,
    "auto-choice": draw_auto,
    "jacobi-window": draw_jacobi,
    "speculative-tree": draw_speculative,
    "lantern-mass": draw_lantern,
    "zipar-rows": draw_zipar,
    "code-hand-over": draw_code,
    "fewer_steps-groups": draw_fewer_steps,
    "feature_cache-passes": draw_feature_cache,
    "cspd-block": draw_cspd,
    "favicon": favicon,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the images of the accelerators' pages.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "accelerators" / "images")
    parser.add_argument("--only", nargs="+", choices=[*IMAGES, *SCHEMATICS], help="draw these alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only or [*SCHEMATICS, *IMAGES]
    for name in chosen:
        if name in SCHEMATICS:
            path = arguments.out / f"{name}.svg"
            with atomic_path(path) as temporary:
                temporary.write_text(SCHEMATICS[name]().svg(), encoding="utf-8")
        else:
            path = arguments.out / f"{name}.webp"
            with atomic_path(path) as temporary:
                IMAGES[name]().save(temporary, "WEBP", quality=92, method=6)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
