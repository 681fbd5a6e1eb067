"""A race as HTML: images as they come, which pass wrote which token, counters, and what was gained."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varaccel.app.markup import data_uri, quality_badge
from varaccel.app.race import Side
from varaccel.pipelines.acceptance_map import pass_colors

VEIL = (128, 128, 128)
"""Colour of places without a token."""

CSS = """
.race {display: grid; grid-template-columns: 1fr 1fr; gap: 16px}
.race .side {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px; min-width: 0}
.race .side.ahead {border-color: var(--color-accent)}
.race h3 {margin: 0 0 8px; font-size: 1rem; overflow-wrap: anywhere}
.race .images {display: grid; gap: 6px; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr))}
.race figure {position: relative; margin: 0; aspect-ratio: 1; background: rgb(128 128 128); border-radius: 6px;
  overflow: hidden; max-width: 512px}
.race figure img {position: absolute; inset: 0; width: 100%; height: 100%; margin: 0}
.race figure .veil, .race figure .map {image-rendering: pixelated}
.race figure .map {display: none}
#race-view:has(#passes input:checked) .race figure .map {display: block}
.race .bar {height: 8px; border-radius: 4px; margin: 10px 0; background: var(--border-color-primary)}
.race .bar div {height: 100%; border-radius: 4px; background: var(--color-accent)}
.race dl {display: grid; grid-template-columns: repeat(4, auto); gap: 2px 12px; margin: 0}
.race dt {font-size: .75rem; opacity: .75; grid-row: 1}
.race dd {margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; grid-row: 2}
.race .verdict {grid-column: 1 / -1; font-size: 1.05rem; margin: 0}
.race .verdict strong {font-size: 1.3rem}
.race .cost {grid-column: 1 / -1; margin: 0; opacity: .85}
@media (max-width: 640px) {
  .race {gap: 8px}
  .race .side {padding: 8px}
  .race dl {grid-template-columns: repeat(2, auto)}
  .race dt, .race dd {grid-row: auto}
  .race dt:nth-of-type(1), .race dt:nth-of-type(2) {grid-row: 1}
  .race dd:nth-of-type(1), .race dd:nth-of-type(2) {grid-row: 2}
  .race dt:nth-of-type(3), .race dt:nth-of-type(4) {grid-row: 3}
  .race dd:nth-of-type(3), .race dd:nth-of-type(4) {grid-row: 4}
}
"""

NOTHING_YET = (
    '<p class="race-empty">Type a prompt and press Race. The same image is then drawn twice from the same seed, '
    "plainly and accelerated, at equal computing time.</p>"
)


def race_html(sides: Sequence[Side], prompt: str, cost: str = "") -> str:
    """The race as it stands.

    Args:
        sides: plain decoding first.
        prompt: what is drawn, for readers that cannot see the images.
        cost: what acceleration costs in quality, shown at the end.
    """
    first = max(sides, key=lambda side: (side.progress, -side.seconds))
    parts = [_side(side, prompt, ahead=side is first and side.progress > 0) for side in sides]
    parts.append(f'<p class="verdict">{_verdict(*sides)}</p>')
    if cost and all(side.phase == "finished" for side in sides):
        parts.append(f'<p class="cost">{html.escape(cost)}</p>')
    return f'<div class="race">{"".join(parts)}</div>'


def _side(side: Side, prompt: str, *, ahead: bool) -> str:
    counters = (
        ("passes", f"{side.passes}"),
        ("tokens", f"{side.tokens:.0f} of {side.of or '?'}"),
        ("tokens per pass", f"{side.tokens_per_pass:.2f}"),
        ("seconds", f"{side.seconds:.2f}"),
    )
    terms = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in counters)
    label = html.escape(side.label)
    return (
        f'<section class="side{" ahead" if ahead else ""}" data-phase="{side.phase}" aria-label="{label}">'
        f"<h3>{label} {quality_badge(side.lossless)}</h3>"
        f'<div class="images">{_images(side, prompt)}</div>'
        f'<div class="bar" role="progressbar" aria-valuenow="{100 * side.progress:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100"><div style="width: {100 * side.progress:.1f}%"></div></div>'
        f"<dl>{terms}</dl></section>"
    )


def _images(side: Side, prompt: str) -> str:
    if not side.images:
        return f"<figure><figcaption>{side.phase}…</figcaption></figure>"
    # what is replaced in a moment may be a rough copy
    saved: dict[str, Any] = {} if side.phase == "finished" else {"format": "JPEG", "quality": 85}
    figures = []
    for index, image in enumerate(side.images):
        state = "" if side.phase == "finished" else f", {100 * side.progress:.0f} % drawn"
        alt = html.escape(f"{prompt}: {side.label}, image {index + 1}{state}", quote=True)
        layers = [f'<img class="image" alt="{alt}" src="{data_uri(image, **saved)}">']
        if side.written is not None:
            written = side.written[index]
            if (written == 0).any():
                layers.append(f'<img class="veil" alt="" src="{data_uri(veil(written))}">')
            colours = data_uri(pass_layer(written, max(1, side.passes)))
            layers.append(f'<img class="map" alt="which pass wrote each token" src="{colours}">')
        figures.append(f"<figure>{''.join(layers)}</figure>")
    return "".join(figures)


def _verdict(plain: Side, fast: Side) -> str:
    if plain.phase == fast.phase == "finished":
        ratio = plain.seconds / fast.seconds
        passes = f"{fast.passes} passes instead of {plain.passes}"
        if fast.passes == plain.passes:
            passes = f"in as many passes, {plain.passes}"
        seconds = f"{fast.seconds:.2f} s instead of {plain.seconds:.2f} s"
        return f"<strong>{ratio:.2f}x</strong> the speed of plain decoding: {seconds}, {passes}."
    if "stopped" in (plain.phase, fast.phase):
        return "Stopped."
    if "warming up" in (plain.phase, fast.phase):
        return "Warming up: the first passes of a call allocate memory and are not timed."
    return (
        f"Plain decoding has {100 * plain.progress:.0f} % of its tokens after {plain.seconds:.2f} s of computing, "
        f"{html.escape(fast.label)} {100 * fast.progress:.0f} % after {fast.seconds:.2f} s."
    )


def veil(written: NDArray[np.int32]) -> Image.Image:
    """[h, w] passes -> a layer that hides places without a token."""
    layer = np.zeros((*written.shape, 4), np.uint8)
    layer[written == 0] = (*VEIL, 255)
    return Image.fromarray(layer)


def pass_layer(written: NDArray[np.int32], passes: int, opacity: float = 0.6) -> Image.Image:
    """[h, w] passes -> a layer of colours, dark for pass 1 and bright for the latest; clear where empty."""
    colours = pass_colors(written, passes)
    alpha = np.where(written > 0, round(255 * opacity), 0).astype(np.uint8)
    return Image.fromarray(np.concatenate([colours, alpha[..., None]], axis=-1))
