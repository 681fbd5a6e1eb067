"""A report as HTML: verdict, plots, tables, settings, and sheets of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from varaccel.app.markup import data_uri, quality_badge
from varaccel.app.reports import Found, read_report
from varaccel.app.trade_off import trade_off
from varaccel.errors import InputError
from varaccel.evaluation.bench.report import BenchReport
from varaccel.evaluation.bench.report_page import best_sentences
from varaccel.evaluation.bench.tables import (
    quality_cells,
    quality_header,
    quality_notes,
    speed_cells,
    speed_header,
)
from varaccel.evaluation.call_text import quality_label

_HIGHLIGHTED = 48
"""Rows that light up in a plot when they are pointed at; larger reports have more, which stay as they are."""


def measured_html(found: Found, batch: int | None = None) -> str:
    """Verdict, plots, tables and settings of a report; one sentence if it is damaged.

    Args:
        batch: images per call whose speed is shown; the smallest measured if None or not measured.
    """
    try:
        report = read_report(found)
        sizes = report.batches
        batch = batch if batch in sizes else next(iter(sizes), None)
        parts = [
            f'<div class="verdict">{"".join(f"<p>{escape(s)}</p>" for s in best_sentences(report))}</div>',
            *([] if batch is None else trade_off(report, batch)),
            *([] if batch is None else _speed(report, batch)),
            *_quality(report),
            _method(found, report),
        ]
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        # a file may look like a report and hold anything
        told = str(error) if isinstance(error, InputError) else f"{found.path.name} holds a damaged report."
        return _page([f"<p>{escape(told)}</p>"])
    return _page(parts)


def images_html(found: Found) -> str:
    """The sheets of samples and maps beside a report; those that are not there are left out."""
    sheets = (
        (
            "-samples.png",
            "What they draw",
            "The same prompts and seeds in every row. A lossless accelerator may still draw other images: it keeps "
            "their distribution, not each of them.",
        ),
        (
            "-maps.png",
            "Which pass decided which token",
            "The same images under the pass that decided each token: dark is the first pass of the call, bright its "
            "last. Colours of different rows mean different numbers of passes.",
        ),
    )
    return _page(
        part
        for ending, title, caption in sheets
        if (path := found.beside(ending)).exists()
        for part in _sheet(path, title, caption)
    )


def _page(parts: Iterable[str]) -> str:
    return f'<div class="va-explore">{"".join(parts)}</div>'


# -- tables --------------------------------------------------------------------------------------------


def _speed(report: BenchReport, batch: int) -> list[str]:
    rounds = report.settings.repeats
    caption = f"Batch {batch}, {f'median of {rounds} rounds' if rounds > 1 else 'one round'}"
    return ["<h3>Speed</h3>", _table(speed_header(report), speed_cells(report, batch), caption)]


def _quality(report: BenchReport) -> list[str]:
    lines = quality_cells(report)
    if not lines:
        return []
    caption = f"{report.settings.images} images per row"
    return ["<h3>Quality</h3>", _table(quality_header(report), lines, caption)]


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> str:
    """A table that scrolls in its own box; the first cell of a line may have lines, a quality becomes a badge."""
    words = {"accelerator", "quality", "against plain"}
    kinds = ["words" if name in words else "number" for name in header]
    titles = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>'
        for name, kind in zip(header, kinds, strict=True)
    )
    body = []
    for call, *cells in lines:
        name, *options = call.split("\n")
        told = "".join(f"<small>{escape(one)}</small>" for one in options)
        body.append(
            f'<tr><th scope="row" class="words">{escape(name)}{told}</th>'
            + "".join(
                f'<td class="{kind}">{_cell(title, cell)}</td>'
                for title, kind, cell in zip(header[1:], kinds[1:], cells, strict=True)
            )
            + "</tr>"
        )
    return (
        f'<p class="caption">{escape(caption)}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(title: str, cell: str) -> str:
    """A cell under its column's title; what stands in brackets goes on in a line of its own."""
    if title == "quality":
        return quality_badge(cell == quality_label(True))
    word, bracket, rest = cell.partition(" (")
    return f"{escape(word)}<small>{escape(rest.removesuffix(')'))}</small>" if bracket else escape(cell)


def _method(found: Found, report: BenchReport) -> str:
    """How it was measured, folded."""
    settings = report.settings
    call = ", ".join(f"{name}={value}" for name, value in settings.call.items())
    rounds = f"median of {settings.repeats} rounds" if settings.repeats > 1 else "one round"
    told = {
        "Machine": settings.place,
        "Precision": settings.dtype,
        **({} if found.measured is None else {"Measured": found.measured}),
        "Model": f"{settings.model}, weights {settings.weights}, {call or 'its own settings of a call'}",
        "Speed": f"{rounds}; every ratio is taken within a round of one run, to plain decoding of the same prompts and "
        "seeds; seconds are those of decoding tokens, for a whole batch",
        "Bars": "smallest and largest ratio of a round, 95 % interval of adherence, one standard deviation of the "
        "distance",
    }
    if settings.images:
        told["Quality"] = " ".join(quality_notes(report))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in told.items())
    return f"<details><summary>How this was measured</summary><dl>{rows}</dl></details>"


def _sheet(path: Path, title: str, caption: str) -> list[str]:
    """A sheet in a box that scrolls on a narrow screen; a sentence if it is no image."""
    heading = f"<h3>{escape(title)}</h3>"
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return [heading, f"<p>{escape(path.name)} cannot be read as an image.</p>"]
    source = data_uri(image, "WEBP", quality=90)  # a sixth of the PNG, and it goes through the page
    return [
        heading,
        f'<figure class="sheet"><div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><img '
        f'alt="{escape(caption)}" width="{image.width}" height="{image.height}" '
        f'src="{source}"></div><figcaption>{escape(caption)}</figcaption></figure>',
    ]


def _highlights() -> str:
    """Rules by which pointing at a row, or tapping it, fades the others in the plots and marks it in the list."""
    rules = []
    for n in range(1, _HIGHLIGHTED + 1):
        for state in ("hover", "focus"):
            pointed = f".va-explore .trade:has(.n{n}:{state})"
            rules.append(f"{pointed} .plot .point:not(.n{n}),{pointed} .bar:not(.n{n}){{opacity:.12}}")
            rules.append(f"{pointed} li.n{n}{{background:var(--background-fill-secondary)}}")
    return "\n".join(rules)


# gradio takes selectors apart at every comma, so none may stand within brackets
CSS = """
.va-explore,.va-quality{--va-lossless:#0b62a3;--va-approximate:#b4480a;--va-truth:#0f6b4a}
.dark .va-explore,.dark .va-quality{--va-lossless:#7cbcf0;--va-approximate:#f5a066;--va-truth:#7fdcb4}
.va-quality{display:inline-block;padding:0 .5em;border:1px solid currentColor;border-radius:99px;font-size:.8em;
font-weight:600;white-space:nowrap;line-height:1.5}
.va-quality.lossless{color:var(--va-lossless)}
.va-quality.approximate{color:var(--va-approximate)}
.va-explore{--va-soft:color-mix(in srgb,var(--body-text-color) 72%,var(--background-fill-primary));
color:var(--body-text-color);font-size:var(--text-md);line-height:1.5;overflow-wrap:break-word}
.va-explore h3{font-size:var(--text-lg);font-weight:600;margin:1.25rem 0 .4rem}
.va-explore p{margin:.3rem 0}
.va-explore small,.va-explore figcaption,.va-explore .caption{color:var(--va-soft);font-size:var(--text-sm)}
.va-explore .verdict{padding:.4rem .9rem;border-left:4px solid var(--va-lossless);
background:var(--background-fill-secondary)}
.va-explore .key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:var(--text-sm);margin-bottom:.6rem}
.va-explore .key span{display:inline-flex;align-items:center;gap:.35rem}
.va-explore .symbol{width:1rem;height:1rem;flex:none}
.va-explore .trade{display:grid;grid-template-columns:repeat(2,minmax(0,30rem));gap:.75rem 1.5rem;align-items:start}
.va-explore figure{margin:0;min-width:0}
.va-explore .plot{display:block;width:100%;height:auto;overflow:visible}
.va-explore .plot text{fill:var(--va-soft);font-size:13px;font-family:inherit}
.va-explore .grid{stroke:var(--border-color-primary);stroke-width:1}
.va-explore .truth{stroke:var(--va-truth);stroke-dasharray:5 4;fill:none}
.va-explore .plot text.truth{stroke:none;fill:var(--va-truth)}
.va-explore .front{stroke:var(--va-soft);stroke-width:1.5;fill:none;opacity:.7}
.va-explore .lossless{--mark:var(--va-lossless)}
.va-explore .approximate{--mark:var(--va-approximate)}
.va-explore .plain{--mark:var(--body-text-color)}
.va-explore .bar{stroke:var(--mark);stroke-width:1;opacity:.55;fill:none}
.va-explore .point{fill:var(--mark);outline:none;cursor:default}
.va-explore .point.approximate polygon{fill:var(--background-fill-primary);stroke:var(--mark);stroke-width:2}
.va-explore .plot .point text{fill:var(--mark);font-weight:600;paint-order:stroke;
stroke:var(--background-fill-primary);stroke-width:3px}
.va-explore .point .reach{fill:transparent;stroke:none}
.va-explore .tie{stroke:var(--mark);stroke-width:.6;fill:none}
.va-explore .point:focus-visible .reach{stroke:var(--body-text-color);stroke-width:2}
.va-explore .point,.va-explore .bar{transition:opacity .15s}
.va-explore ol{grid-column:1/-1;columns:17rem;column-gap:1rem;list-style:none;margin:0;padding:0;
font-size:var(--text-sm)}
.va-explore li{display:flex;gap:.45rem;align-items:baseline;padding:.2rem .35rem;border-radius:6px;margin:0;
break-inside:avoid}
.va-explore li .symbol{position:relative;top:.15rem}
.va-explore li small{display:block}
.va-explore .scroll{overflow-x:auto;margin:.4rem 0;border:1px solid var(--border-color-primary);border-radius:8px}
.va-explore table{border-collapse:collapse;width:100%;margin:0;font-size:var(--text-sm);
font-variant-numeric:tabular-nums}
.va-explore th,.va-explore td{padding:.35rem .6rem;text-align:right;vertical-align:top;white-space:nowrap;
border-top:1px solid var(--border-color-primary)}
.va-explore thead th{vertical-align:bottom;color:var(--va-soft)}
.va-explore th.words,.va-explore td.words{text-align:left}
.va-explore tr th:first-child{position:sticky;left:0;background:var(--background-fill-primary)}
.va-explore th{font-weight:600}
.va-explore th small,.va-explore td small{display:block;font-weight:400}
.va-explore details{margin-top:1rem;border:1px solid var(--border-color-primary);border-radius:8px;padding:.5rem .8rem}
.va-explore summary{cursor:pointer;font-weight:600}
.va-explore dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.6rem 0 .2rem;
font-size:var(--text-sm)}
.va-explore dt{font-weight:600}
.va-explore dd{margin:0;min-width:0;overflow-wrap:anywhere}
.va-explore .sheet .scroll{background:#fff}
.va-explore .sheet img{display:block;max-width:100%;min-width:34rem;height:auto}
@media (min-width:60rem){
.va-explore .plot text{font-size:10.5px}
}
@media (max-width:40rem){
.va-explore .trade{grid-template-columns:minmax(0,1fr)}
.va-explore dl{grid-template-columns:1fr;gap:0}
.va-explore dd{margin-bottom:.35rem}
}
""" + _highlights()
"""Styles of the tab."""
