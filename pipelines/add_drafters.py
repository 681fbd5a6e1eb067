"""Put trained drafters into a pipeline folder, so that accelerators find them by name.

    varaccel train drafter --token-ids runs/token-ids --scenes runs/scenes --out runs/eagle --unroll 2 --lr 3e-3
    python pipelines/train_mini_llamagen.py --config pipelines/mini_llamagen_small.json --stages transformer
    python pipelines/add_drafters.py weights/mini-llamagen --eagle runs/eagle/export --small runs/llamagen-small/export
    python pipelines/weights_manifest.py

Weights are written in half precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from varaccel import AutoPipeline, EagleHead, LlamaGenPipeline, LlamaGenTransformer
from varaccel.console import tolerant_console
from varaccel.errors import InputError
from varaccel.training.command_line import exit_status


def add_drafters(folder: Path, eagle: Path | None, small: Path | None) -> None:
    """Write the pipeline in `folder` anew, with these drafters in place of those it had."""
    if eagle is None and small is None:
        raise InputError("name a drafter to be added: --eagle FOLDER, --small FOLDER or both.")
    pipe = AutoPipeline.from_pretrained(folder)
    parts = dict(pipe.components)
    if eagle is not None:
        parts["eagle_head"] = EagleHead.from_pretrained(eagle)
    if small is not None:
        parts["draft_transformer"] = LlamaGenTransformer.from_pretrained(small)
    settings = {name: pipe.config[name] for name in ("class_names", "guidance_scale", "top_k", "temperature")}
    LlamaGenPipeline(**parts, **settings).to(torch.float16).save_pretrained(folder)


def main() -> int:
    tolerant_console()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, help="folder of the pipeline")
    parser.add_argument("--eagle", type=Path, help="folder of an EagleHead")
    parser.add_argument("--small", type=Path, help="folder of a smaller LlamaGenTransformer")
    options = parser.parse_args()
    return exit_status(lambda: add_drafters(options.pipeline, options.eagle, options.small))


if __name__ == "__main__":
    sys.exit(main())
