"""Two processes that hold a model together, for test_tensor_parallel.py.

Each has the environment that `torchrun` gives, writes what it drew as JSON, then runs the command line. They are forks
of one process, which spares importing everything twice.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

import varaccel
from tests.transformers_cases import CASES
from varaccel.accelerators import AnyAccelerator, auto

ACCELERATORS: dict[str, AnyAccelerator] = {
    "plain": varaccel.Plain(),
    "jacobi": varaccel.Jacobi(4),
    "layers": varaccel.Speculative("layers", 3),
    "tree": varaccel.Speculative("layers", "dynamic"),
    "zipar": varaccel.ZipAR(3),
    "auto": varaccel.Auto(),
}
TIMEOUT = 200
"""Seconds after which a process that waits for the other says where."""
PROMPTS = ["a red sphere", "a blue cube left of a red sphere"]


def drawn(pipe: Any, accelerator: AnyAccelerator, **options: Any) -> list[list[int]]:
    """Token ids of the images of `PROMPTS`."""
    canvas: list[torch.Tensor] = []

    def keep(pipe: object, step: int, decided: object, shown: dict[str, Any]) -> dict[str, Any]:
        canvas.append(shown["canvas"].tokens)
        return {}

    pipe(PROMPTS, accelerator=accelerator, output_type="latent", callback_on_step_end=keep, **options)
    return canvas[-1].tolist()


def everything(pipe: Any) -> dict[str, list[list[int]]]:
    """Greedy images by every accelerator, and sampled ones."""
    found = {
        name: drawn(pipe, accelerator, temperature=0, seed=0) for name, accelerator in ACCELERATORS.items()
    }
    found["sampled"] = drawn(pipe, varaccel.Jacobi(4), temperature=2.0, seed=5)
    return found


def draw_as(rank: int, port: int, folders: list[Path], out: Path) -> None:
    """What one of the two processes does."""
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    # measured by each; jacobi with other windows would wait for the other process for ever
    measured = auto.pass_seconds
    auto.pass_seconds = lambda *what: measured(*what) * 0 + 1 + rank * what[1].window
    told: dict[str, Any] = {}
    for folder in folders:
        whole = CASES[folder.name].pipeline()
        # what the folder of a model does not say: sizes of images, and the small preview of GLM-Image
        known = {name: whole.config[name] for name in ("height", "width") if name in whole.config}
        pipe: Any = varaccel.AutoPipeline.from_pretrained(
            folder, tp_size=2, processor=whole.processor, **known
        )
        pipe.set_progress_bar_config(disable=True)
        keys = next(iter(pipe.transformer.layers)).self_attn.k_proj.weight
        told[folder.name] = {
            "parts": keys.shape[0] / keys.to_local().shape[0],
            "split": everything(pipe),
            # draws of which no process told the others
            "no seed": drawn(pipe, varaccel.Plain(), temperature=2.0),
            "own generators": drawn(
                pipe, varaccel.Plain(), temperature=2.0, generator=torch.Generator().manual_seed(rank)
            ),
        }
    (out / f"{rank}.json").write_text(json.dumps(told))
    sys.argv = ["varaccel", "generate", PROMPTS[0], "--model", str(folders[0]), "--tp", "2", "--json"]
    sys.argv += ["--seed", "3", "--out", str(out / "split.png")]
    runpy.run_module("varaccel", run_name="__main__")


def main(folders: list[Path], out: Path) -> int:
    """Start both; the first exit code that is not 0."""
    torch.set_num_threads(1)
    _ = varaccel.AutoPipeline  # imports the models
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=draw_as, args=(rank, port, folders, out)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    return next((process.exitcode or 0 for process in both if process.exitcode), 0)


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[2:]], Path(sys.argv[1])))
