"""Options of the command line that are declared once: those that several commands share, and long ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODELS_OWN = "the model's own"

Model = Annotated[str, typer.Option(help="Shipped or published model, folder or hub id (see `models`).")]
Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
Precision = Annotated[
    str, typer.Option(help="Precision of the networks that decide tokens: float32 or bfloat16.")
]
FirstSeed = Annotated[int, typer.Option(help="Seed of the first image.")]
Processes = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        help="Processes that hold a part of every layer each (models of transformers, under `torchrun`).",
        show_default="1",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]

# -- arguments of a pipeline call ----------------------------------------------------------------------

GuidanceScale = Annotated[
    float | None, typer.Option(help="How strictly to follow the prompt; 1 = off.", show_default=MODELS_OWN)
]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the most likely token.", show_default=MODELS_OWN)
]
TopK = Annotated[
    int | None, typer.Option(help="Keep the k most likely tokens; 0 = all.", show_default=MODELS_OWN)
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the most likely tokens up to this mass; 1 = all.", show_default=MODELS_OWN),
]
NumIterations = Annotated[
    int | None,
    typer.Option(min=1, help="Passes that decide the tokens (MAR).", show_default=MODELS_OWN),
]
HeadSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps of a token (MAR).", show_default=MODELS_OWN),
]

# -- accelerators --------------------------------------------------------------------------------------

AcceleratorName = Annotated[str, typer.Option("-a", "--accelerator", help="See `models`.")]
AcceleratorOptions = Annotated[
    list[str] | None, typer.Option("-o", "--option", help="Accelerator option key=value; repeatable.")
]
DemoAccelerators = Annotated[
    list[str] | None,
    typer.Option(
        *("-a", "--accelerator"),
        metavar="NAME:KEY=VALUE,...",
        help="What to show beside plain decoding; repeatable.",
        show_default="two or three that suit the model",
    ),
]
BenchAccelerators = Annotated[
    list[str] | None,
    typer.Option(
        *("-a", "--accelerator"),
        metavar="NAME:KEY=VALUE,...",
        help="What to compare with plain decoding; repeatable.",
        show_default="a grid over the accelerators of the model",
    ),
]

# -- what `bench` measures and writes ------------------------------------------------------------------

Batches = Annotated[
    list[int] | None, typer.Option(min=1, help="Images per timed call; repeatable.", show_default="1")
]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
JudgedImages = Annotated[int, typer.Option(min=0, help="Images per accelerator to judge quality; 0 = none.")]
TrueScenes = Annotated[
    int, typer.Option(min=0, help="True images to measure the distance from; 0 = no distance.")
]
EveryGuidance = Annotated[
    float | None, typer.Option(help="Guidance of every call; 1 = off.", show_default=MODELS_OWN)
]
EveryTemperature = Annotated[
    float | None, typer.Option(help="Temperature of every call.", show_default=MODELS_OWN)
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile the networks; the first calls then take minutes.")
]
DrawnTogether = Annotated[
    int, typer.Option(min=1, help="Images per call where quality is judged; a GPU is quicker with more.")
]
ReportFile = Annotated[
    Path | None, typer.Option(help="Also write everything as JSON here, from the first rows on.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what --out holds of the same settings.")]
PlotFile = Annotated[Path | None, typer.Option(help="Image of speed against quality (needs matplotlib).")]
SamplesFile = Annotated[Path | None, typer.Option(help="Image of what each accelerator draws.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")]
