"""The tab that shows the last report: speed against quality of the models that were measured, tables and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from varaccel.app.events import PRIVATE
from varaccel.app.report_view import images_html, measured_html
from varaccel.app.reports import Found, found_reports, read_report
from varaccel.errors import InputError


def explore_tab(folders: Sequence[Path]) -> None:
    """Fill the open tab of a page with the reports of `folders`, such as those of `report_folders`.

    Everything is read when it is shown, so a report that is measured again while the page is open is seen.
    """
    reports = {found.title: found for found in found_reports(folders)}
    if not reports:
        gr.Markdown(
            "There is no report here. Run `make bench` in a clone of varaccel, or `varaccel bench --out "
            "outputs/report/mini-llamagen.json`, and open the page anew."
        )
        return

    def show_model(title: str) -> tuple[Any, str, str]:
        found = reports[title]
        return _batch_choice(found), measured_html(found), images_html(found)

    def show_batch(title: str, batch: int | None) -> str:
        return measured_html(reports[title], batch)

    first = next(iter(reports.values()))
    with gr.Row():
        model = gr.Radio(list(reports), value=first.title, label="model", scale=3)
        batches, own = _batches(first)
        batch = gr.Radio(batches, value=own, label="images drawn at once", scale=2, min_width=180)
    measured = gr.HTML(measured_html(first), apply_default_css=False)
    images = gr.HTML(images_html(first), apply_default_css=False)
    # only what a visitor chooses counts, so that choosing a model does not also count as choosing a batch
    model.input(show_model, model, [batch, measured, images], **PRIVATE)
    batch.input(show_batch, [model, batch], measured, **PRIVATE)


def _batches(found: Found) -> tuple[list[tuple[str, int]], int | None]:
    """Batch sizes to choose from, with words for them, and the first one; none of a damaged report."""
    try:
        sizes = read_report(found).batches
    except InputError:
        return [], None
    return [(str(size), size) for size in sizes], sizes[0] if sizes else None


def _batch_choice(found: Found) -> Any:
    choices, value = _batches(found)
    return gr.update(choices=choices, value=value)
