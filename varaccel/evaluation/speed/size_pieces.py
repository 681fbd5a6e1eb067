"""Pieces of a suite: one size and one thing that is measured of it, each a file of its own."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varaccel.accelerators.notation import parse_grid
from varaccel.errors import InputError
from varaccel.evaluation.published import infinity, janus, llamagen, mar, var
from varaccel.evaluation.speed.call_speed import measure_speed
from varaccel.evaluation.speed.first_tokens import first_tokens
from varaccel.evaluation.speed.loop_script import in_turns, median_ratio, seconds_of
from varaccel.evaluation.speed.machine import describe_machine
from varaccel.evaluation.speed.probe import MeasuredPasses, pass_times
from varaccel.evaluation.speed.random_models import random_pipeline, random_prompts
from varaccel.evaluation.speed.roofline import floor_of
from varaccel.evaluation.speed.size_catalog import Kind, Size, Suite
from varaccel.files import write_text
from varaccel.nn.devices import Device, is_gpu


@dataclass(frozen=True)
class Piece:
    """What one size is measured for.

    Attributes:
        suite: that it belongs to.
        device: to measure on.
        compile: options of `pipe.compile`.
    """

    suite: Suite
    size: Size
    kind: Kind
    device: Device
    compile: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.size.name}.{self.kind}"

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a finished piece to count."""
        suite = self.suite
        return {
            "changes": json.loads(json.dumps(dict(self.size.changes))),
            "dtype": suite.dtype,
            "images": list(suite.images),
            "tokens": list(suite.tokens),
            "rounds": suite.rounds,
            "loop_tokens": suite.loop_tokens,
            "mar": dict(suite.mar),
            "machine": describe_machine(torch.device(self.device)),
        }

    def finished(self, folder: Path) -> dict[str, Any] | None:
        """What was found earlier with the same settings on the same machine; None if there is nothing."""
        try:
            found: dict[str, Any] = json.loads((folder / f"{self.name}.json").read_text())
        except (OSError, ValueError):
            return None
        return found if found.get("settings") == self.settings else None

    def measure(self, folder: Path) -> dict[str, Any]:
        """Measure and write the piece to its file in `folder`, whole or not at all."""
        pipe = random_pipeline(self.size, self.device, getattr(torch, self.suite.dtype))
        try:
            rows = _MEASURES[self.kind](self, pipe)
        finally:
            del pipe
            gc.collect()
            if is_gpu(self.device):
                torch.cuda.empty_cache()
        result = {
            "size": self.size.name,
            "family": self.size.family,
            "kind": self.kind,
            "settings": self.settings,
            "rows": rows,
        }
        write_text(json.dumps(result, indent=2) + "\n", folder / f"{self.name}.json")
        return result

    def call(self) -> dict[str, Any]:
        """Arguments of the size's pipeline calls in this suite."""
        return {**self.size.call, **(self.suite.mar if self.size.family == "mar" else {})}


def pieces(suite: Suite, device: Device, compile_options: Mapping[str, Any]) -> Iterator[Piece]:
    """All pieces of a suite."""
    for size in suite.sizes:
        for kind in size.kinds:
            yield Piece(suite, size, kind, device, compile_options)


Rows = list[dict[str, Any]]


def _curve(piece: Piece, pipe: Any) -> Rows:
    """One row per number of images: the curve, floors of its passes and the peak of memory."""
    rows = []
    dtype = getattr(torch, piece.suite.dtype)
    for images in piece.suite.images:
        # a compiled pass is made in the first call and may be recorded in the second
        warmups = 2 if piece.kind == "compiled" else 1
        found: MeasuredPasses = pass_times(
            pipe,
            random_prompts(piece.size, images),
            piece.suite.tokens,
            rounds=piece.suite.rounds,
            warmups=warmups,
            **piece.call(),
        )
        floors = {
            count: floor_of(work, pipe.transformer.device, dtype).seconds
            for count, work in found.works.items()
        }
        points = [{**point, "floor": floors.get(point["tokens"])} for point in found.curve.to_list()]
        rows.append({"images": images, "points": points, "peak_bytes": found.peak_bytes})
    return rows


def _compiled(piece: Piece, pipe: Any) -> Rows:
    pipe.compile(**piece.compile)
    if not pipe.is_compiled:
        raise InputError("there is no compiler here, so nothing was measured.")
    return _curve(piece, pipe)


def _loop(piece: Piece, pipe: Any) -> Rows:
    """Plain decoding and the published loop in turns, for one image."""
    ours, theirs, tokens = _LOOPS[piece.size.family](piece, pipe)
    seconds = in_turns({"ours": ours, "published loop": theirs}, piece.suite.rounds)
    return [
        {
            "images": 1,
            "tokens": tokens,
            "seconds": seconds,
            "ratio": median_ratio(seconds["published loop"], seconds["ours"]),
        }
    ]


Loops = tuple[Callable[[], float], Callable[[], float], str]
"""Seconds of ours and of theirs, and how much of an image both draw."""


def _token_loops(piece: Piece, pipe: Any, total: int, theirs: Callable[[int], object], **call: Any) -> Loops:
    limit = piece.suite.loop_tokens
    part = None if limit is None or limit >= total else limit
    count = total if part is None else part
    prompts = random_prompts(piece.size, 1)
    return (
        lambda: first_tokens(pipe, prompts, part, **{**piece.call(), **call}).seconds["tokens"],
        lambda: seconds_of(lambda: theirs(count), piece.device),
        "all" if part is None else f"first {count} of {total}",
    )


def _llamagen_loops(piece: Piece, pipe: Any) -> Loops:
    call, model = piece.call(), pipe.transformer
    with torch.no_grad():
        labels = pipe._condition(random_prompts(piece.size, 1)).values
    filters = {"cfg": call["guidance_scale"], "top_k": call["top_k"]}
    return _token_loops(
        piece,
        pipe,
        model.num_tokens,
        lambda count: llamagen.published_loop(model, labels, tokens=count, **filters),
    )


def _janus_loops(piece: Piece, pipe: Any) -> Loops:
    prompts = torch.tensor([pipe._prompt_ids("", None)], device=piece.device)
    cfg = piece.call()["guidance_scale"]
    return _token_loops(
        piece,
        pipe,
        pipe.transformer.layout[0] ** 2,
        lambda count: janus.published_loop(pipe.model, prompts, cfg=cfg, tokens=count),
        top_k=0,  # theirs has no filter
    )


def _var_loops(piece: Piece, pipe: Any) -> Loops:
    call, model = piece.call(), pipe.transformer
    with torch.inference_mode():
        given = pipe._condition(random_prompts(piece.size, 1))
        vectors = model.embed_condition(given.values, given.mask)
    filters = {"top_k": call["top_k"], "top_p": call["top_p"]}

    def theirs() -> object:
        quantizer = pipe.vq_model.quantize
        return var.published_loop(model, quantizer, vectors, cfg=call["guidance_scale"] - 1, **filters)

    prompts = random_prompts(piece.size, 1)
    return (
        lambda: first_tokens(pipe, prompts, **call).seconds["tokens"],
        lambda: seconds_of(theirs, piece.device),
        "all",
    )


def _infinity_loops(piece: Piece, pipe: Any) -> Loops:
    call, model, prompts = piece.call(), pipe.transformer, random_prompts(piece.size, 1)
    with torch.inference_mode():
        given = pipe._condition(prompts)
    filters = {"temperature": call["temperature"], "top_p": call["top_p"]}

    def theirs() -> object:
        quantizer = pipe.vq_model.quantizer(pipe.schedule)
        return infinity.published_loop(model, quantizer, given, cfg=call["guidance_scale"], **filters)

    return (
        lambda: first_tokens(pipe, prompts, **call).seconds["tokens"],
        lambda: seconds_of(theirs, piece.device),
        "all",
    )


def _mar_loops(piece: Piece, pipe: Any) -> Loops:
    from varaccel.engine.randomness import image_generators
    from varaccel.hosts.masked.denoising import HeadSampling
    from varaccel.hosts.masked.guidance import MaskedGuidance
    from varaccel.hosts.masked.noise import TokenNoise

    call, model = piece.call(), pipe.transformer
    device = torch.device(piece.device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    noise = TokenNoise.draw(image_generators(1, 0), model.num_tokens, model.channels, device)
    common: dict[str, Any] = {
        "guidance": MaskedGuidance(call["guidance_scale"]),
        "sampling": HeadSampling(call["head_steps"]),
        "iterations": call["num_iterations"],
    }
    return (
        lambda: mar.our_shares(model, labels, None, noise, **common)[1].total,
        lambda: mar.published_loop(model, labels, None, noise, **common)[1].total,
        f"all, {call['num_iterations']} iterations of {call['head_steps']} head steps",
    )


_LOOPS: Mapping[str, Callable[[Piece, Any], Loops]] = {
    "llamagen": _llamagen_loops,
    "janus": _janus_loops,
    "var": _var_loops,
    "infinity": _infinity_loops,
    "mar": _mar_loops,
}


def _accelerators(piece: Piece, pipe: Any) -> Rows:
    """Accelerators of whole images against plain decoding in the same rounds."""
    report = measure_speed(
        pipe,
        random_prompts(piece.size, 1),
        parse_grid(piece.size.accelerators),
        repeats=max(1, piece.suite.rounds // 2),
        on_call=lambda _: None,
        **piece.call(),
    )
    return [
        {
            "accelerator": one.label,
            "passes": one.passes,
            "seconds": statistics.median(one.seconds),
            "speedup": one.speedup,
        }
        for one in report.measurements
    ]


_MEASURES: Mapping[Kind, Callable[[Piece, Any], Rows]] = {
    "curve": _curve,
    "compiled": _compiled,
    "loop": _loop,
    "accelerators": _accelerators,
}
