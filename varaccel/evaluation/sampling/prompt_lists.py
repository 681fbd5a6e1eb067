"""What images of an evaluation are asked to show."""

from __future__ import annotations

import codecs
import re
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
            "classes:random": drawn evenly, from `seed`; or a text file (UTF-8, or UTF-16 with a byte order mark) of
            one prompt per line, repeated in turn if more images are wanted. Lines end as in editors, with LF, CR LF or
            CR; the Unicode separators U+2028, U+2029 and U+0085 end lines in a file that has no other line ends, and
            are white space within a line else.
        count: images; by default as many as the file has prompts.

    Raises:
        InputError: a source that does not fit the model, an empty or missing file, no count where one is needed, a
            prompt that the model cannot draw (named with its line).
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
    path = Path(source)
    lines = _lines(path)
    for number, line in lines[:count]:
        try:
            pipe.check_prompts([line])
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    return [lines[index % len(lines)][1] for index in range(count or len(lines))]


def _needed(count: int | None, source: str) -> int:
    if count is None:
        raise InputError(f"say how many images to draw of {source}.")
    return count


def _classes(pipe: Any) -> int | None:
    """How many classes the model draws, None if it takes descriptions."""
    signature = pipe.transformer.signature()
    return signature.condition_size if signature.condition == "class" else None


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with text and their numbers, from 1 on."""
    try:
        text = _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a file of prompts: {error}; or use {SCENES} or {CLASSES}."
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    separators = re.compile("[\u2028\u2029\u0085]")
    if "\n" not in text:
        text = separators.sub("\n", text)
    lines = (separators.sub(" ", line).strip() for line in text.split("\n"))
    kept = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not kept:
        raise InputError(f"{path} holds no prompts; write one per line.")
    return kept


def _decoded(content: bytes) -> str:
    """The text of a file; a byte order mark is no part of its first line."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")
