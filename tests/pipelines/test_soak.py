"""Many different calls at once on one pipeline: each image is the one drawn alone, and nothing piles up."""

from __future__ import annotations

import ctypes
import gc
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ShippedPipelines
from tests.pipelines.test_beside_each_other import half_image
from tests.tiny import PROMPTS, new_pipeline
from varaccel.errors import InputError

THREADS = 4


class Mishap(Exception):
    """What a caller's own code raises."""


@dataclass(frozen=True)
class Request:
    """One call of a soak.

    Attributes:
        options: of the call.
        stop_after: passes after which it is stopped; None for never.
        look: decode a preview after every pass.
        mishap: what the callback does wrong: "raises" or "returns" something of its own.
        inpaint: paint into an image instead.
    """

    options: dict[str, Any] = field(default_factory=dict)
    stop_after: int | None = None
    look: bool = False
    mishap: str | None = None
    inpaint: bool = False

    def draw(self, pipe: Any) -> tuple[Any, ...]:
        """What came of it, as plain values; an error that is expected as its text."""

        def after_pass(pipe: Any, step: int, tokens: int, shown: dict[str, Any]) -> Any:
            if self.look:
                shown["preview"]()
            if self.mishap == "raises":
                raise Mishap
            if step + 1 == self.stop_after:
                pipe._interrupt = True
            return {"latents": None} if self.mishap == "returns" else None

        options = {"callback_on_step_end": after_pass, **self.options}
        try:
            if self.inpaint:
                out = pipe.inpaint(*half_image(pipe.image_size), **options)
            else:
                out = pipe(**options)
        except (InputError, Mishap) as error:
            return (type(error), str(error))
        images = [np.asarray(image).tobytes() for image in out.images]
        return (
            images,
            out.written.numpy().tobytes(),
            out.stats.passes,
            out.stats.tokens,
            out.stats.interrupted,
        )


def requests(prompts: Sequence[str | int], accelerators: Sequence[str], *, inpaint: bool) -> list[Request]:
    """Different calls: batch sizes, output types, guidance, accelerators, stopped ones, bad ones."""
    found = []
    for i, prompt in enumerate(prompts):
        call = {"prompt": prompt, "seed": i}
        found += [
            Request(call | {"output_type": "pt"}),
            Request(call | {"num_images_per_prompt": 2 + i}),
            Request(call | {"guidance_scale": 1.0, "output_type": "latent"}, look=i == 0),
            Request(call | {"num_images_per_prompt": 1 + i}, stop_after=1 + i),
            Request(call | {"accelerator": accelerators[i % len(accelerators)], "output_type": "np"}),
            Request(call | {"accelerator": accelerators[i % len(accelerators)]}, stop_after=2),
        ]
        if inpaint:
            found.append(Request(call | {"prompt": None if i else prompt}, inpaint=True))
    call = {"prompt": prompts[0], "seed": 0}
    bad: list[dict[str, Any]] = [
        {"seed": -1},
        {"output_type": "png"},
        {"prompt": []},
        {"num_images_per_prompt": 0},
        {"accelerator": "none such"},
        {"guidance_scale": float("nan")},
    ]
    found += [Request(call | options) for options in bad]
    return [*found, Request(call, mishap="raises"), Request(call, mishap="returns")]


def soak(pipe: Any, calls: Sequence[Request], seed: int = 0) -> list[tuple[Any, ...]]:
    """What came of `calls`, in their order, made by several threads in an order of chance."""
    order = list(range(len(calls)))
    random.Random(seed).shuffle(order)
    with ThreadPoolExecutor(THREADS) as threads:
        results = dict(zip(order, threads.map(lambda i: calls[i].draw(pipe), order), strict=True))
    return [results[i] for i in range(len(calls))]


def wrong(
    results: Sequence[tuple[Any, ...]], calls: Sequence[Request], alone: dict[int, Any]
) -> list[Request]:
    return [call for call, result in zip(calls, results, strict=True) if result != alone[id(call)]]


@pytest.mark.parametrize(
    ("kind", "accelerators"),
    [
        ("t2i", ["zipar", "jacobi"]),
        ("var-caption", ["code"]),
        ("infinity", ["code"]),
        ("mar-caption", ["cspd", "feature_cache"]),
    ],
)
def test_soak(kind: str, accelerators: list[str]) -> None:
    pipe = new_pipeline(kind)
    prompts = [str(prompt) for prompt in PROMPTS[kind][:2]]
    # as long as the caption can be: such a prompt is tokenized twice
    calls = requests(
        [prompts[0], " ".join([*prompts, "a a a"])], accelerators, inpaint=kind in ("var-caption", "infinity")
    )
    alone = {id(call): call.draw(pipe) for call in calls}
    assert sum(isinstance(result[0], type) for result in alone.values()) == 8, "the bad ones are refused"
    assert sum(result[-1] is True for result in alone.values()) == 4, "the stopped ones are stopped"
    assert wrong(soak(pipe, calls), calls, alone) == []


def resident() -> int:
    """Memory of the process in bytes, after what is free has been handed back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a Linux process")
def test_soak_of_a_shipped_model(shipped: ShippedPipelines) -> None:
    """200 calls from four threads; memory is as it was, up to much less than the caches of these calls."""
    pipe = shipped("mini-var")
    prompts = [
        "a large red sphere on a wooden floor",
        " ".join(["a small green cone left of a blue cube"] * 4),
    ]
    different = requests(prompts, ["code"], inpaint=True)
    alone = {id(call): call.draw(pipe) for call in different}
    caches = pipe(prompts[0], seed=0, output_type="latent").stats.cache_bytes  # of one guided image
    assert wrong(soak(pipe, different), different, alone) == []
    before = resident()
    calls = [different[i % len(different)] for i in range(200)]
    assert wrong(soak(pipe, calls, seed=1), calls, alone) == []
    drawn = sum(not isinstance(alone[id(call)][0], type) for call in calls)
    assert drawn > 120
    assert resident() - before < drawn * caches / 3
    assert not any(torch.is_inference(p) for p in pipe.transformer.parameters())
