"""What images of an evaluation are asked to show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from varaccel.engine.seeds import seeded_generator
from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import held_out_captions
from varaccel.shipped import shipped_models

SCENES, CLASSES, RANDOM_CLASSES = "scenes", "classes", "classes:random"


def default_source(pipe: Any, model: str) -> str:
    """Where prompts come from if nothing is said: classes where a model draws those, scenes for the shipped models.

    Raises:
        InputError: a model of prompts that does not ship.
    """
    if _classes(pipe) is not None:
        return CLASSES
    if model in shipped_models():
        return SCENES
    raise InputError(f"{model} draws descriptions; name a file of prompts, one per line.")


def list_prompts(pipe: Any, source: str, count: int | None, seed: int = 0) -> list[str | int]:
    """One prompt per image.

    Args:
        pipe: of which classes there are.
        source: "scenes": held-out captions of the captioned world; "classes": every class equally often, in turn;
            "classes:random": drawn evenly, from `seed`; or a text file of one prompt per line, repeated in turn if
            more images are wanted.
        count: images; by default as many as the file has prompts.

    Raises:
        InputError: a source that does not fit the model, an empty or missing file, no count where one is needed.
    """
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, got {count}.")
    classes = _classes(pipe)
    if source in (CLASSES, RANDOM_CLASSES):
        if classes is None:
            raise InputError("this model draws descriptions, not classes; name a file of prompts.")
        wanted = _needed(count, source)
        if source == CLASSES:
            return [index % classes for index in range(wanted)]
        # drawn as a whole, so that they do not depend on how the work is split
        generator = seeded_generator(seed)
        return list(torch.randint(classes, (wanted,), generator=generator).tolist())
    if classes is not None:
        raise InputError(f"this model draws classes, not descriptions; use {CLASSES} or {RANDOM_CLASSES}.")
    if source == SCENES:
        return [caption.text for caption in held_out_captions(_needed(count, source))]
    lines = _lines(Path(source))
    return [lines[index % len(lines)] for index in range(count or len(lines))]


def _needed(count: int | None, source: str) -> int:
    if count is None:
        raise InputError(f"say how many images to draw of {source}.")
    return count


def _classes(pipe: Any) -> int | None:
    """How many classes the model draws, None if it takes descriptions."""
    signature = pipe.transformer.signature()
    return signature.condition_size if signature.condition == "class" else None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a file of prompts: {error}; or use {SCENES} or {CLASSES}."
        ) from error
    kept = [line for line in lines if line]
    if not kept:
        raise InputError(f"{path} holds no prompts; write one per line.")
    return kept
