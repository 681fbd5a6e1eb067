"""A comparison as HTML: a row per setting, with its images, what they cost and how to draw them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from html import escape

from PIL import Image

from varaccel.accelerators import AnyAccelerator
from varaccel.app.comparison import TIMED_ONCE, ComparedRow
from varaccel.app.markup import data_uri, quality_badge
from varaccel.app.snippet import DrawRequest, given_options, reproduce_command
from varaccel.errors import InputError

_SHOWN = 256
"""Longer side of an image on the page in pixels, at most: dozens of them go through it at once."""

HEADER = ("setting", "images", "passes", "tokens per pass", "seconds", "speed-up")


def compared_html(rows: Sequence[str], wanted: DrawRequest, note: str, machine: str) -> str:
    """The comparison as it stands.

    Args:
        rows: of `row_html`.
        wanted: what is drawn.
        note: what is going on, empty when all is done.
        machine: where it runs.
    """
    titles = "".join(f'<th scope="col">{title}</th>' for title in HEADER)
    body = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    first, last = wanted.seed, wanted.seed + wanted.count - 1
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    said = [f"<p>{escape(wanted.model)}: {escape(wanted.prompt)} ({seeds})</p>"]
    if note:
        said.append(f'<p class="note" role="status">{escape(note)}</p>')
    if rows:
        told = escape(TIMED_ONCE).replace("`varaccel bench`", "<code>varaccel bench</code>")
        body += f'<p class="small">{told} Seconds are those of decoding tokens, of {escape(machine)}.</p>'
    return f'<div class="va-compare">{"".join(said)}{body}</div>'


def row_html(row: ComparedRow, wanted: DrawRequest) -> str:
    """A row of the table; on a phone its cells stand below each other under their titles."""
    stats = row.stats
    images = "".join(
        f'<img alt="{escape(f"{wanted.prompt}, seed {row.seed + index}: {row.label}")}" '
        f'width="{image.width}" height="{image.height}" src="{data_uri(image)}">'
        for index, image in enumerate(map(_reduced, row.output.images))
    )
    options = "".join(f"<small>{escape(told)}</small>" for told in _options(row.accelerator))
    chose = "" if row.chosen is None else f"<small>chose {escape(row.chosen)}</small>"
    figures = (
        f"{stats.passes}",
        f"{stats.tokens_per_pass:.2f}",
        f"{stats.seconds['tokens']:.2f}",
        f"<b>{row.speedup:.2f}x</b> {quality_badge(row.stats.lossless)}",
    )
    cells = "".join(
        f'<td data-title="{title}">{figure}</td>' for title, figure in zip(HEADER[2:], figures, strict=True)
    )
    return (
        f'<tr><th scope="row">{escape(row.accelerator.name)}{options}{chose}{_command(row, wanted)}</th>'
        f'<td class="images"><div>{images}</div></td>{cells}</tr>'
    )


def _options(accelerator: AnyAccelerator) -> Iterator[str]:
    """The options that tell a setting from others: the first one if it has a value, and those that were given."""
    given = given_options(accelerator)
    for item in fields(accelerator):
        value = getattr(accelerator, item.name)
        if item.name in given or (item.name == fields(accelerator)[0].name and value is not None):
            yield f"{item.name}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _command(row: ComparedRow, wanted: DrawRequest) -> str:
    """How to draw the row again, folded."""
    try:
        told = reproduce_command(
            replace(wanted, accelerator=row.accelerator.name, options=given_options(row.accelerator))
        )
    except InputError as error:
        told = str(error)
    return f"<details><summary>reproduce</summary><code>{escape(told)}</code></details>"


def _reduced(image: Image.Image) -> Image.Image:
    """An image as it is, or smaller if it is large."""
    if max(image.size) <= _SHOWN:
        return image
    smaller = image.copy()
    smaller.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return smaller


CSS = """
.va-compare{color:var(--body-text-color);font-size:var(--text-md);line-height:1.5;overflow-wrap:anywhere}
.va-compare p{margin:.3rem 0}
.va-compare .note{padding:.4rem .9rem;border-left:4px solid var(--color-accent);
background:var(--background-fill-secondary)}
.va-compare small,.va-compare .small,.va-compare summary{font-size:var(--text-sm);
color:color-mix(in srgb,var(--body-text-color) 72%,var(--background-fill-primary))}
.va-compare table{border-collapse:collapse;width:100%;margin:.5rem 0;font-variant-numeric:tabular-nums}
.va-compare th,.va-compare td{padding:.5rem .6rem;text-align:right;vertical-align:top;
border-top:1px solid var(--border-color-primary)}
.va-compare thead th{border-top:0;font-size:var(--text-sm);font-weight:600}
.va-compare th:first-child,.va-compare th:nth-child(2),.va-compare .images{text-align:left}
.va-compare tbody th{font-weight:600;width:14rem}
.va-compare small{display:block;font-weight:400}
.va-compare .images div{display:flex;flex-wrap:wrap;gap:6px}
.va-compare img{display:block;margin:0;border-radius:6px;max-width:100%;height:auto}
.va-compare details{font-weight:400}
.va-compare summary{cursor:pointer}
.va-compare details code{display:block;font-size:var(--text-xs);user-select:all;white-space:pre-wrap;
background:var(--background-fill-secondary);padding:.3rem .5rem;border-radius:6px}
@media (max-width:48rem){
.va-compare thead{display:none}
.va-compare table,.va-compare tbody{display:block}
.va-compare tr{display:grid;grid-template-columns:repeat(4,auto);gap:.15rem .8rem;padding:.6rem 0;
border-top:1px solid var(--border-color-primary)}
.va-compare tbody th,.va-compare .images{grid-column:1/-1;width:auto}
.va-compare tr th,.va-compare tr td{border:0;padding:.15rem 0;text-align:left}
.va-compare td[data-title]::before{content:attr(data-title);display:block;font-size:var(--text-xs);
color:color-mix(in srgb,var(--body-text-color) 72%,var(--background-fill-primary))}
.va-compare .images div{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.5rem,1fr))}
.va-compare .images img{width:100%}
}
"""
"""Styles of the tab; those of the badges are in `varaccel.app.report_view.CSS`."""
