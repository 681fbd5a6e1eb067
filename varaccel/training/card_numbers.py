"""The numbers of a model's card: how and on what it was trained, and what it reaches; from the folders of its runs."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from varaccel.files import write_text
from varaccel.nn.devices import is_gpu
from varaccel.training.run import history


def write_card_numbers(folder: Path, out: Path, runs: Iterable[str], device: str, command: str) -> None:
    """Write `numbers.json` and `numbers.md` into the folder of a pipeline, and the loss curves of its runs.

    Args:
        folder: of the pipeline; its prompt adherence is read from `adherence.json`, where there is one.
        out: folder of the runs.
        runs: names of their folders; those that do not exist are passed over.
        device: that was trained on.
        command: that trained.
    """
    numbers: dict[str, Any] = {
        "machine": machine(device),
        "torch": torch.__version__,
        "command": command,
        "runs": {run: training(out / run) for run in runs if (out / run / "checkpoint.pt").is_file()},
    }
    judged = folder / "adherence.json"
    if judged.is_file():
        report = json.loads(judged.read_text(encoding="utf-8"))
        numbers["adherence"] = {"images": report["images"], **report["rates"]}
    for run in numbers["runs"]:
        if (plot := out / run / "loss.png").is_file():
            shutil.copy(plot, folder / f"loss-{run}.png")
    write_text(json.dumps(numbers, indent=2) + "\n", folder / "numbers.json")
    write_text(table(numbers), folder / "numbers.md")


def machine(device: str) -> str:
    """What it was trained on."""
    if is_gpu(device):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def training(run: Path) -> dict[str, Any]:
    """Steps, samples, minutes and the last of every measured number of a run."""
    rows = history(run)
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    batch = state["settings"].get("recipe", {}).get("batch_size")
    measured = {key: row[key] for row in rows for key in row if "validation" in key}
    quality = run / "quality.json"
    return {
        "steps": state["step"],
        "samples": state["step"] * batch if batch else None,
        "minutes": round(state["seconds"] / 60, 2),
        **measured,
        **(json.loads(quality.read_text(encoding="utf-8")) if quality.is_file() else {}),
    }


def table(numbers: Mapping[str, Any]) -> str:
    """The same as tables of a card."""
    lines = [
        f"Trained on {numbers['machine']}, torch {numbers['torch']}:",
        "",
        f"    {numbers['command']}",
        "",
    ]
    for run, values in numbers["runs"].items():
        told = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
        lines.append(f"- `{run}`: {told}")
    if judged := numbers.get("adherence"):
        lines += ["", f"Prompt adherence, {judged['images']} held-out prompts, 95 % Wilson intervals:", ""]
        lines += ["| | rate |", "|---|---:|"]
        for name, rate in judged.items():
            if name != "images":
                share, low, high = (f"{100 * rate[key]:.1f}" for key in ("share", "low", "high"))
                lines.append(f"| {name.replace('_', ' ')} | {share} % [{low}, {high}] |")
    return "\n".join(lines) + "\n"
