"""What the pieces of a suite found, in tables and a figure, and wall clocks that follow from curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varaccel.engine.pass_curve import PassCurve
from varaccel.engine.statistics import call_label
from varaccel.files import atomic_path
from varaccel.speculation.tree import resolve_tree

Piece = Mapping[str, Any]


def tokens_read(accelerator: str, options: Mapping[str, Any]) -> int | None:
    """Tokens per image that a pass of the host model reads; None where it varies from pass to pass."""
    if accelerator == "plain":
        return 1
    if options.get("row_window") is not None:  # several lanes, as many as are open
        return None
    if accelerator == "jacobi":
        return int(options["window"])
    tree = options.get("tree")
    if accelerator not in ("speculative", "lantern") or tree is None or tree == "dynamic":
        return None
    return len(resolve_tree(tree).parents)


def computed_rows(curve: PassCurve, rows: int, bench: Path) -> list[dict[str, Any]]:
    """Speed-ups over plain decoding from pass times and what was recorded of accelerators on a shipped model.

    A call of n tokens per pass takes passes / n of plain decoding's, each of the time that the curve says of the tokens
    it reads. The time of drafters is left out: those of published sizes are not measured.

    Args:
        rows: network rows per image, to be found among those of the curve.
        bench: a report of `varaccel bench`; its smallest batch is taken.
    """
    found = []
    for row in json.loads(bench.read_text())["rows"]:
        count = tokens_read(row["accelerator"], row["options"])
        if count is None or count > max(curve.tokens(rows)):
            continue
        recorded = min(row["speed"], key=lambda one: one["batch"])
        per_pass = recorded["tokens_per_pass"]
        ratio = curve.at(count, rows) / curve.at(1, rows)
        found.append(
            {
                "accelerator": call_label(row["accelerator"], row["options"]),
                "tokens_read": count,
                "tokens_per_pass": per_pass,
                "pass_ratio": ratio,
                "speedup": per_pass / ratio,
                "computed": True,
            }
        )
    return found


def with_computed(found: Sequence[Piece], bench: Path) -> list[dict[str, Any]]:
    """The pieces; curves of causal models get `computed` rows for the first number of images."""
    whole = []
    for piece in found:
        added = dict(piece)
        if (
            piece["family"] in ("llamagen", "janus")
            and piece["kind"] in ("curve", "compiled")
            and bench.is_file()
        ):
            points = piece["rows"][0]["points"]
            if points:
                added["computed"] = computed_rows(PassCurve.from_list(points), points[0]["rows"], bench)
        whole.append(added)
    return whole


def markdown(found: Sequence[Piece], title: str) -> str:
    """Tables of everything that was found."""
    parts = [f"# {title}"]
    curves = [piece for piece in found if piece["kind"] in ("curve", "compiled")]
    if curves:
        lines = [(piece, row, point) for piece in curves for row in piece["rows"] for point in row["points"]]
        parts += ["## Time per pass", _table(
            ["size", "", "images", "rows", "tokens per image", "ms", "floor (ms)", "reached", "peak (MB)"],
            [
                [
                    piece["size"],
                    "eager" if piece["kind"] == "curve" else "compiled",
                    row["images"],
                    point["rows"],
                    point["tokens"],
                    f"{1000 * point['seconds']:.3g}",
                    "-" if point["floor"] is None else f"{1000 * point['floor']:.3g}",
                    "-" if point["floor"] is None else f"{100 * point['floor'] / point['seconds']:.2g} %",
                    "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
                ]
                for piece, row, point in lines
            ],
        )]  # fmt: skip
    loops = [(piece, row) for piece in found if piece["kind"] == "loop" for row in piece["rows"]]
    if loops:
        parts += ["## Plain decoding and the published loop", _table(
            ["size", "tokens", "ours (s)", "published loop (s)", "ratio"],
            [
                [piece["size"], row["tokens"], _best(row, "ours"), _best(row, "published loop"), f"{row['ratio']:.2f}"]
                for piece, row in loops
            ],
        )]  # fmt: skip
    timed = [
        [piece["size"], row["accelerator"], f"{row['passes']:.4g}", f"{row['seconds']:.3g}", f"{row['speedup']:.2f}"]
        for piece in found
        if piece["kind"] == "accelerators"
        for row in piece["rows"]
    ]  # fmt: skip
    if timed:
        parts += [
            "## Accelerators, measured",
            _table(["size", "accelerator", "passes", "s", "× plain"], timed),
        ]
    computed = [
        [
            piece["size"],
            "eager" if piece["kind"] == "curve" else "compiled",
            row["accelerator"],
            row["tokens_read"],
            f"{row['tokens_per_pass']:.2f}",
            f"{row['pass_ratio']:.2f}",
            f"{row['speedup']:.2f}",
        ]
        for piece in found
        for row in piece.get("computed", [])
    ]
    if computed:
        header = [
            "size",
            "",
            "accelerator",
            "tokens read",
            "tokens decided",
            "pass ÷ one-token pass",
            "× plain",
        ]
        parts += [
            "## Accelerators, computed",
            "From the measured time of passes and the tokens per pass that were recorded on the shipped model, one "
            "image; without the time of drafters.",
            _table(header, computed),
        ]
    return "\n\n".join(parts) + "\n"


def _best(row: Mapping[str, Any], name: str) -> str:
    return f"{min(row['seconds'][name]):.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write_figure(found: Sequence[Piece], path: Path) -> None:
    """Time of a pass over that of a one-token pass, by tokens: flat is where accelerators pay off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for piece in found:
        if piece["kind"] not in ("curve", "compiled") or piece["family"] in ("var", "mar"):
            continue
        for row in piece["rows"]:
            points = sorted(row["points"], key=lambda point: point["tokens"])
            if not points:
                continue
            label = f"{piece['size']}, {row['images']} images"
            axes.plot(
                [point["tokens"] for point in points],
                [point["seconds"] / points[0]["seconds"] for point in points],
                marker=".",
                linestyle="-" if piece["kind"] == "curve" else "--",
                label=label if piece["kind"] == "curve" else f"{label}, compiled",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens per image and pass")
    axes.set_ylabel("time ÷ time of a one-token pass")
    if axes.lines:
        axes.legend(fontsize=6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
