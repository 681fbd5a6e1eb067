"""One HTML page of bench reports that needs nothing but itself: tables, plots and images of one or several models."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from varaccel.errors import InputError
from varaccel.evaluation.bench.comparison import Comparison
from varaccel.evaluation.bench.fronts import fronts
from varaccel.evaluation.bench.report import BenchReport, Row
from varaccel.evaluation.bench.tables import (
    quality_cells,
    quality_header,
    quality_notes,
    speed_cells,
    speed_header,
)
from varaccel.evaluation.call_text import quality_label

_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root{color-scheme:light dark;--ground:#fbfbf9;--card:#fff;--ink:#1c1d1f;--soft:#5b6067;--line:#dcdee0;
--accent:#0b62a3;--lossless:#0f6b4a;--lossless-ground:#e0f3ea;--approximate:#8a4a00;--approximate-ground:#fdeeda;--bad:#a32626;
--front:#eef5fb}
@media (prefers-color-scheme:dark){:root{--ground:#141517;--card:#1c1e21;--ink:#e8e9eb;--soft:#a2a8b0;--line:#34373c;
--accent:#7cbcf0;--lossless:#7fdcb4;--lossless-ground:#123528;--approximate:#f2bd77;--approximate-ground:#3d2a10;--bad:#ff9a91;
--front:#1b2935}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif;overflow-wrap:break-word}
header,main,footer{max-width:75rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.01em}
h2{font-size:1.45rem;line-height:1.25;margin:0 0 .75rem;overflow-wrap:anywhere}
h3{font-size:1.08rem;margin:2rem 0 .5rem}
p{margin:.5rem 0;max-width:46rem}
a{color:var(--accent)}
.soft{color:var(--soft)}
small,.note,figcaption,caption,dl{font-size:.875rem}
nav ul{display:flex;flex-wrap:wrap;gap:.5rem;list-style:none;margin:1rem 0 0;padding:0}
nav a{display:block;padding:.25rem .8rem;border:1px solid var(--line);border-radius:99px;background:var(--card);
text-decoration:none;overflow-wrap:anywhere}
section{margin:2rem 0;padding:1.5rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
.verdict{margin:0 0 1.25rem;padding:.6rem 1rem;border-left:4px solid var(--accent);background:var(--front);
border-radius:0 8px 8px 0;max-width:none}
.verdict p{max-width:none;margin:.25rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:0;color:var(--soft)}
dt{font-weight:600}dd{margin:0;min-width:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:8px}
.scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{caption-side:top;text-align:left;padding:.55rem .75rem;color:var(--soft);border-bottom:1px solid var(--line)}
th,td{padding:.45rem .65rem;text-align:right;vertical-align:top;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;vertical-align:bottom;font-weight:600;color:var(--soft)}
th:first-child,.words{text-align:left}
th:first-child{position:sticky;left:0;background:var(--card)}
tbody th{font-weight:600}
tbody th small{display:block;font-weight:400;color:var(--soft);line-height:1.4}
tr.front,tr.front th{background:var(--front)}
tr.front th:first-child{box-shadow:inset 4px 0 0 var(--accent)}
tr.truth{font-style:italic}
.badge{display:inline-block;padding:.05rem .55rem;border-radius:99px;font-size:.78rem;font-weight:600;
white-space:nowrap}
.lossless{color:var(--lossless);background:var(--lossless-ground)}
.approximate{color:var(--approximate);background:var(--approximate-ground)}
.better{color:var(--lossless)}.worse{color:var(--bad)}
td .why{display:block;color:var(--soft);font-size:.8rem}
figure{margin:.6rem 0}
figure .scroll{background:#fff;padding:.5rem}
img{display:block;width:100%;height:auto}
.plot img{min-width:46rem}
.sheet img{width:auto;max-width:100%;min-width:34rem}
figcaption{color:var(--soft);max-width:46rem}
footer{padding-bottom:3rem;color:var(--soft)}
@media (max-width:40rem){header{padding-top:1.5rem}h1{font-size:1.5rem}
header,main,footer{padding-left:.75rem;padding-right:.75rem}
section{padding:1rem .85rem;margin:1.25rem 0}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}}
@media print{.scroll{overflow:visible}section{break-inside:auto;border:0;padding:0}}
"""


@dataclass(frozen=True)
class Section:
    """What the page shows of one model.

    Attributes:
        title: its heading.
        report: what was measured.
        measured: when, in words; such as a date.
        plot: PNG of speed against quality, as `bench.plot.plot` writes it; None if no images were judged.
        samples: PNG of what the accelerators draw, see `bench.samples.Samples.sheet`.
        maps: PNG of which pass decided each token, see `bench.samples.Samples.maps`; None for models without.
    """

    title: str
    report: BenchReport
    measured: str
    plot: bytes | None
    samples: bytes
    maps: bytes | None = None


def report_page(sections: Sequence[Section], heading: str = "Speed against quality") -> str:
    """The page as HTML, a section per model: style and images are inside, nothing is asked of any server.

    Args:
        heading: of the page.

    Raises:
        InputError: no sections; an image that is no PNG.
    """
    if not sections:
        raise InputError("a report needs at least one model.")
    places = [f"model-{number}" for number in range(1, len(sections) + 1)]
    links = "".join(
        f'<li><a href="#{place}">{escape(section.title)}</a></li>'
        for place, section in zip(places, sections, strict=True)
    )
    body = "\n".join(_section(section, place) for place, section in zip(places, sections, strict=True))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>varaccel: {escape(heading)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(heading)}</h1>
<p>Accelerators of visual autoregressive models beside plain decoding of the same model: every speed-up is a ratio to
plain decoding of the same prompts and seeds, taken within a round of the same run, and quality is judged on images
of the same prompts and seeds.</p>
<p>{_badge(True)} draws from the same distribution as plain decoding; {_badge(False)} does not, so its
quality has to be looked at. Rows with a bar at their left are on the Pareto front: no other row beats them in both
speed and the quality that is named.</p>
<nav aria-label="Models"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p><small>Made by varaccel. This page loads nothing from any server and runs no scripts.</small></p></footer>
</body>
</html>
"""


def best_sentences(report: BenchReport) -> list[str]:
    """A sentence per batch size: the fastest lossless and approximate setting as good as plain decoding up to noise.

    See `BenchReport.best`. Without judged images one sentence says that there is nothing to choose by.
    """
    if report.plain.quality is None:
        return ["No images were judged, so no setting can be called as good as plain decoding."]
    sentences = []
    for batch in report.batches:
        told = []
        for lossless in (True, False):
            row, kind = report.best(batch, lossless=lossless), quality_label(lossless)
            told.append(
                f"no {kind} setting is faster than plain decoding and within noise of its quality"
                if row is None
                else f"the fastest {kind} setting within noise of the quality of plain decoding is "
                f"{_named(row, batch)}"
            )
        sentences.append(f"Batch {batch}: {'; '.join(told)}.")
    return sentences


def _named(row: Row, batch: int) -> str:
    one = row.speed[batch]
    low, high = one.speedup_spread
    return f"{row.label} at {one.speedup:.2f}x ({low:.2f} to {high:.2f})"


# -- parts ---------------------------------------------------------------------------------------------


def _section(section: Section, place: str) -> str:
    report = section.report
    parts = [f'<section id="{place}">', f"<h2>{escape(section.title)}</h2>"]
    parts.append(
        f'<div class="verdict">{"".join(f"<p>{escape(s)}</p>" for s in best_sentences(report))}</div>'
    )
    told = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in _settings(section).items())
    parts.append(f"<dl>{told}</dl>")
    if section.plot is not None:
        parts += [
            f"<h3>Speed against quality, batch {report.batches[0]}</h3>",
            _figure(
                section.plot,
                f"{section.title}: speed-up over plain decoding against prompt adherence and, where measured, "
                "Fréchet distance; the figures are in the tables below",
                "Filled marks are lossless; the grey line joins the Pareto front. Bars: smallest and largest ratio of "
                "a round, 95 % interval of adherence, one standard deviation of the distance.",
                "plot",
            ),
        ]
    parts.append("<h3>Speed</h3>")
    parts += [_speed_table(report, batch) for batch in report.batches]
    if quality_cells(report):
        parts += ["<h3>Quality</h3>", _quality_table(report)]
        parts += [f'<p class="note soft">{escape(note)}</p>' for note in quality_notes(report)]
    parts += [
        "<h3>Samples</h3>",
        _figure(
            section.samples,
            f"{section.title}: images of the same prompts and seeds, a row per accelerator, plain decoding first",
            "The same prompts and seeds in every row. A lossless accelerator may still draw other images: it keeps "
            "their distribution, not each of them.",
            "sheet",
        ),
    ]
    if section.maps is not None:
        parts += [
            "<h3>Which pass decided which token</h3>",
            _figure(
                section.maps,
                f"{section.title}: the same images in grey under colours of the pass that decided each token, a row "
                "per accelerator",
                "The same images under the pass that decided each token: dark is the first pass of the call, bright "
                "its last. Colours of different rows mean different numbers of passes.",
                "sheet",
            ),
        ]
    return "\n".join([*parts, "</section>"])


def _settings(section: Section) -> dict[str, str]:
    """How it was measured, in words."""
    settings = section.report.settings
    call = ", ".join(f"{name}={value}" for name, value in settings.call.items())
    told = {
        "Machine": settings.machine,
        "Precision": settings.dtype + (", networks compiled" if settings.compiled else ""),
        "Measured": section.measured,
        "Model": f"{settings.model}, weights {settings.weights}, {call or 'its own settings of a call'}",
        "Speed": f"{_rounds(settings.repeats)}, prompts {settings.prompts}, seeds from {settings.seed}; "
        "seconds are those of decoding tokens, for a whole batch",
    }
    if settings.images:
        last = settings.seed + settings.images - 1
        told["Quality"] = (
            f"{settings.images} images per row, captions {settings.captions}, seeds {settings.seed} to {last}"
        )
        told["Reference"] = settings.reference or "none, so no distance"
    return told


def _rounds(repeats: int) -> str:
    return f"median of {repeats} rounds" if repeats > 1 else "one round"


def _speed_table(report: BenchReport, batch: int) -> str:
    rows = [row for row in report.rows if batch in row.speed]
    found = fronts(report, batch)
    marks = {
        row.key: ", ".join(kind for kind, front in found.items() if row in front)
        for row in (rows if found else [])
    }
    lines = []
    for row, (call, _, *cells) in zip(rows, speed_cells(report, batch), strict=True):
        mark = marks.get(row.key, "")
        lines.append(
            f'<tr class="{"front" if mark else "behind"}">{_head(call)}<td class="words">{_badge(row.lossless)}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + (f'<td class="words">{mark or "-"}</td>' if found else "")
            + "</tr>"
        )
    header = speed_header(report) + (["Pareto front"] if found else [])
    title = f"Batch {batch}, {_rounds(report.settings.repeats)}"
    return _table(header, lines, title, {"quality", "Pareto front"})


def _quality_table(report: BenchReport) -> str:
    rows: list[Row | None] = [row for row in report.rows if row.quality is not None]
    if report.truth is not None:
        rows.append(None)
    lines = []
    for row, (call, *cells) in zip(rows, quality_cells(report), strict=True):
        versus = None if row is None else report.against_plain(row)
        shown = [
            _verdict(cell, versus, place) if place in _GROUNDS else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(cells)
        ]
        kind = "truth" if row is None else "judged"
        lines.append(f'<tr class="{kind}">{_head(call)}{"".join(shown)}</tr>')
    title = f"Quality of {report.settings.images} images per row"
    return _table(quality_header(report), lines, title, {"against plain"})


_GROUNDS: Mapping[int, Callable[[Comparison], tuple[bool, bool]]] = {
    1: lambda versus: (versus.same_adherence, versus.gained > versus.lost),
    3: lambda versus: (versus.same_distance is not False, (versus.distance or 0) < 0),
}
"""Of the cells after the accelerator those that compare with plain decoding, and whether they say same and better."""


def _verdict(cell: str, versus: Comparison | None, place: int) -> str:
    """A cell that compares with plain decoding: the verdict, and what it rests on in a second line."""
    word, bracket, rest = cell.partition(" (")
    kind = ""
    if versus is not None:
        same, good = _GROUNDS[place](versus)
        kind = "" if same else "better" if good else "worse"
    why = f'<span class="why">{escape(rest.removesuffix(")"))}</span>' if bracket else ""
    return f'<td class="words"><span class="{kind}">{escape(word)}</span>{why}</td>'


def _head(call: str) -> str:
    """The first cell of a line: the accelerator, and its options below it."""
    name, *options = call.split("\n")
    return f'<th scope="row">{escape(name)}{"".join(f"<small>{escape(one)}</small>" for one in options)}</th>'


def _badge(lossless: bool) -> str:
    """The label of an accelerator in its own colour."""
    quality = quality_label(lossless)
    return f'<span class="badge {quality}">{quality}</span>'


def _table(header: Sequence[str], lines: Sequence[str], title: str, words: set[str]) -> str:
    """A table that scrolls in its own box.

    Args:
        lines: the rows as HTML.
        words: titles of columns that hold words and are aligned to the left.
    """
    columns = "".join(
        f'<th scope="col" class="{"words" if name in words else "number"}">{escape(name)}</th>'
        for name in header
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table>'
        f"<caption>{escape(title)}</caption><thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _figure(png: bytes, words: str, caption: str, kind: str) -> str:
    """An image that scrolls in its own box on a narrow screen.

    Args:
        words: for those who cannot see it.
    """
    if not png.startswith(_PNG):
        raise InputError("images of a report are PNG files.")
    width, height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="{kind}"><div class="scroll" tabindex="0" role="region" aria-label="{escape(words)}">'
        f'<img alt="{escape(words)}" width="{width}" height="{height}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
