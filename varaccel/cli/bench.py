"""`varaccel bench`: speed, passes and quality of accelerators beside plain decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from varaccel.cli.options import (
    Batches,
    BenchAccelerators,
    Compiled,
    Device,
    DrawnTogether,
    EveryGuidance,
    EveryTemperature,
    FirstSeed,
    HeadSteps,
    JudgedImages,
    Markdown,
    Model,
    NumIterations,
    PlotFile,
    Precision,
    Repeats,
    ReportFile,
    Resume,
    SamplesFile,
    TrueScenes,
)
from varaccel.errors import InputError


def bench(
    model: Model = "mini-llamagen",
    accelerator: BenchAccelerators = None,
    batch: Batches = None,
    repeats: Repeats = 5,
    images: JudgedImages = 100,
    scenes: TrueScenes = 1000,
    guidance_scale: EveryGuidance = None,
    temperature: EveryTemperature = None,
    num_iterations: NumIterations = None,
    head_steps: HeadSteps = None,
    seed: FirstSeed = 0,
    device: Device = "cpu",
    dtype: Precision = "float32",
    compiled: Compiled = False,
    drawn_together: DrawnTogether = 10,
    out: ReportFile = None,
    resume: Resume = False,
    plot: PlotFile = None,
    samples: SamplesFile = None,
    markdown: Markdown = False,
) -> None:
    """Speed, passes and quality of accelerators, against plain decoding in the same run."""
    from varaccel.accelerators.notation import parse_grid
    from varaccel.evaluation.bench.grids import default_grid
    from varaccel.evaluation.bench.held_out import bench_held_out
    from varaccel.evaluation.bench.report_files import earlier_report, write_report
    from varaccel.pipelines.call_options import call_options
    from varaccel.pipelines.placement import open_pipeline
    from varaccel.shipped import smaller_model

    files = BenchFiles(out, plot, samples)
    files.check(resume=resume, judged=images > 0)
    typed = None if accelerator is None else parse_grid(accelerator)
    finished = earlier_report(out) if resume and out is not None else None
    pipe: Any = open_pipeline(model, device, dtype)
    call = call_options(
        pipe,
        model,
        guidance_scale=guidance_scale,
        temperature=temperature,
        num_iterations=num_iterations,
        head_steps=head_steps,
    )
    if compiled:
        pipe.compile()
    pipe.check_images(max(batch or [1]))
    grid = parse_grid(default_grid(pipe, smaller_model(model))) if typed is None else typed
    pipe.set_progress_bar_config(disable=True)
    report = bench_held_out(
        pipe,
        grid,
        model=model,
        images=images,
        scenes=scenes,
        batches=batch or [1],
        repeats=repeats,
        seed=seed,
        compiled=pipe.is_compiled,
        drawn_together=drawn_together,
        finished=finished,
        on_rows=None if out is None else lambda rows: write_report(rows, out),
        **call,
    )
    show(report, markdown=markdown)
    files.write(report, pipe, grid, seed, call)


@dataclass(frozen=True)
class BenchFiles:
    """What is written beside the tables.

    Attributes:
        report: everything as JSON.
        plot: image of speed against quality.
        samples: image of what each accelerator draws.
    """

    report: Path | None
    plot: Path | None
    samples: Path | None

    def check(self, *, resume: bool, judged: bool) -> None:
        """Refuse, before anything is measured, what could not be written.

        Args:
            resume: whether the report is to be continued.
            judged: whether images are judged.

        Raises:
            InputError: a path that cannot be written to; a plot without quality or without matplotlib.
        """
        from varaccel.evaluation.extra import check_extra
        from varaccel.files import check_writable
        from varaccel.image_files import check_image_path

        check_writable(self.report)
        if resume and self.report is None:
            raise InputError("--resume continues the report of --out; name that file.")
        for path in (self.plot, self.samples):
            if path is not None:
                check_image_path(path)
        if self.plot is not None:
            check_extra("matplotlib")
            if not judged:
                raise InputError("--plot shows quality, so it needs images to be judged; raise --images.")

    def write(self, report: Any, pipe: Any, grid: Any, seed: int, call: dict[str, Any]) -> None:
        """Write the files that were asked for, and say so."""
        from varaccel.evaluation.bench.held_out import held_out_examples
        from varaccel.evaluation.bench.plot import plot
        from varaccel.evaluation.bench.report_files import write_report
        from varaccel.evaluation.bench.samples import sample_sheet
        from varaccel.image_files import write_image

        if self.report is not None:
            write_report(report, self.report)
            typer.echo(f"wrote {self.report}")
        if self.plot is not None:
            plot(report, self.plot)
            typer.echo(f"wrote {self.plot}")
        if self.samples is not None:
            shown = held_out_examples(pipe)
            write_image(sample_sheet(pipe, grid, shown, seed=seed, **call), self.samples)
            typer.echo(f"wrote {self.samples}")


def show(report: Any, *, markdown: bool) -> None:
    """Print the tables."""
    from rich.console import Console

    from varaccel.evaluation.bench.tables import bench_markdown, bench_table

    if markdown:
        typer.echo(bench_markdown(report))
    else:
        Console().print(bench_table(report))
