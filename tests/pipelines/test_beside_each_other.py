"""Calls beside each other: who is stopped, what a callback may do, and that what a call hands out is the caller's."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image
from torch import Tensor, nn

from tests.tiny import PROMPTS, new_pipeline, pipeline, told
from varaccel import CoDe, CSpD, Speculative
from varaccel.errors import InputError

KINDS = ("c2i", "var-class", "mar-class", "infinity")
on_kinds = pytest.mark.parametrize("kind", KINDS)


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in a thread of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Held:
    """A call in a thread of its own that waits after its first pass until it is let go."""

    def __init__(self, pipe: Any, **options: Any) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.shown: dict[str, Any] = {}
        self.out: Any = None

        def wait(pipe: Any, step: int, tokens: int, shown: dict[str, Any]) -> None:
            self.shown = self.shown or shown
            self.begun.set()
            assert self.go_on.wait(60)

        def draw() -> None:
            self.out = pipe(told(pipe, 1), seed=0, output_type="latent", callback_on_step_end=wait, **options)

        self._thread = threading.Thread(target=draw)
        self._thread.start()
        assert self.begun.wait(60)

    def finish(self) -> Any:
        self.go_on.set()
        self._thread.join(60)
        return self.out


def stop(pipe: Any, *_: Any) -> None:
    pipe._interrupt = True


def half_image(size: int) -> tuple[Image.Image, Image.Image]:
    """An image, and a mask of its left half."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


# -- stopping ------------------------------------------------------------------------------------------


@on_kinds
def test_a_callback_stops_its_own_call(kind: str) -> None:
    """The other one comes back whole, and each says what it is."""
    pipe = new_pipeline(kind)
    whole = pipe(told(pipe, 1), seed=0, output_type="latent")
    other = Held(pipe)
    stopped = pipe(told(pipe, 2), seed=1, callback_on_step_end=stop)
    out = other.finish()
    assert torch.equal(out.images, whole.images)
    assert (out.stats.passes, out.stats.tokens) == (whole.stats.passes, whole.stats.tokens)
    assert not out.stats.interrupted
    assert not whole.stats.interrupted
    assert stopped.stats.interrupted
    assert stopped.stats.passes == 1
    assert stopped.stats.tokens == int((stopped.written > 0).sum()) < whole.stats.tokens
    assert "interrupted" in str(stopped.stats)
    assert stopped.stats.to_dict()["interrupted"]


@on_kinds
def test_a_call_that_begins_does_not_take_back_that_another_is_stopped(kind: str) -> None:
    pipe = new_pipeline(kind)
    other = Held(pipe)
    other.shown["stop"]()
    assert not pipe(told(pipe, 2), seed=1).stats.interrupted
    out = other.finish()
    assert out.stats.interrupted
    assert out.stats.passes == 1


def test_one_of_several_calls_is_stopped_from_another_thread() -> None:
    pipe = new_pipeline("c2i")
    first, second = Held(pipe), Held(pipe)
    in_thread(second.shown["stop"])
    assert not first.finish().stats.interrupted
    assert second.finish().stats.interrupted


def test_a_thread_without_a_call_stops_all_of_the_pipeline() -> None:
    pipe, another = new_pipeline("c2i"), new_pipeline("c2i")
    calls, apart = [Held(pipe), Held(pipe)], Held(another)
    pipe._interrupt = True
    assert pipe.interrupt
    assert not another.interrupt
    assert [call.finish().stats.interrupted for call in calls] == [True, True]
    assert not apart.finish().stats.interrupted
    assert not pipe.interrupt, "the next call is not stopped"
    assert not pipe(told(pipe, 1), seed=0).stats.interrupted


def test_before_a_call_there_is_nothing_to_stop() -> None:
    pipe = new_pipeline("c2i")
    pipe._interrupt = True
    assert not pipe(told(pipe, 1), seed=0).stats.interrupted


def test_a_call_within_a_callback_is_a_call_of_its_own() -> None:
    pipe, inner = new_pipeline("c2i"), []

    def nest(pipe: Any, step: int, tokens: int, shown: dict[str, Any]) -> None:
        if step == 1:
            inner.append(pipe(told(pipe, 2), seed=1, callback_on_step_end=stop))
            assert not pipe.interrupt
        if step == 2:
            inner.append(pipe(told(pipe, 2), seed=1))
            pipe._interrupt = True

    out = pipe(told(pipe, 1), seed=0, callback_on_step_end=nest)
    assert [o.stats.interrupted for o in inner] == [True, False]
    assert out.stats.passes == 3


def test_stopped_at_the_last_pass_it_is_whole() -> None:
    pipe = pipeline("var-class")
    out = pipe(told(pipe, 1), seed=0, callback_on_step_end=lambda p, step, n, s: step == 2 and s["stop"]())
    assert out.stats.passes == 3
    assert not out.stats.interrupted


def test_a_stop_can_be_taken_back_in_the_same_callback() -> None:
    def change_of_mind(pipe: Any, *_: Any) -> None:
        pipe._interrupt = True
        pipe._interrupt = False

    assert not pipeline("c2i")(1, seed=0, callback_on_step_end=change_of_mind).stats.interrupted


@on_kinds
def test_pipelines_can_be_copied_and_a_copy_is_stopped_alone(kind: str) -> None:
    pipe = new_pipeline(kind)
    whole = pipe(told(pipe, 1), seed=0, output_type="latent").images
    for twin in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        call = Held(pipe)
        twin._interrupt = True
        out = call.finish()
        assert not out.stats.interrupted
        assert torch.equal(twin(told(pipe, 1), seed=0, output_type="latent").images, whole)


@on_kinds
def test_a_call_that_fails_leaves_nothing_behind(kind: str) -> None:
    pipe = new_pipeline(kind)

    def fail(pipe: Any, *_: Any) -> None:
        pipe._interrupt = True
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe(told(pipe, 1), seed=0, callback_on_step_end=fail)
    assert not pipe.interrupt
    assert not pipe(told(pipe, 1), seed=0).stats.interrupted


def test_calls_of_an_offloaded_pipeline_follow_each_other() -> None:
    """Each moves the weights that the other is about to read; a call within a callback does not wait for its own."""
    pipe, passes = new_pipeline("c2i"), []
    hook = ModelHook()
    hook.execution_device = "cpu"
    add_hook_to_module(pipe.transformer, hook)

    def draw(number: int) -> Any:
        def note(pipe: Any, step: int, *_: Any) -> None:
            passes.append(number)
            time.sleep(0.001)
            if step == 0:
                pipe(told(pipe, 1), seed=0)

        return pipe(told(pipe, 1), seed=number, callback_on_step_end=note)

    with ThreadPoolExecutor(3) as threads:
        assert all(out.stats.passes == 16 for out in threads.map(draw, range(3)))
    assert [len(list(group)) for _, group in groupby(passes)] == [16, 16, 16]


# -- callbacks -----------------------------------------------------------------------------------------


@on_kinds
@pytest.mark.parametrize(
    "returned",
    [
        lambda shown: {"latents": shown["canvas"].tokens},
        lambda shown: {**shown, "canvas": copy.copy(shown["canvas"])},
        lambda shown: shown.update(canvas=None) or shown,
    ],
    ids=["foreign", "exchanged", "exchanged in place"],
)
def test_what_a_callback_exchanges_is_refused(kind: str, returned: Any) -> None:
    with pytest.raises(
        InputError, match=r"^callback_on_step_end returned its own '(latents|canvas)'; [^\n]*\.$"
    ):
        pipeline(kind)(
            told(pipeline(kind), 1), seed=0, callback_on_step_end=lambda p, i, n, shown: returned(shown)
        )


@on_kinds
@pytest.mark.parametrize(
    "returned", [lambda shown: shown, lambda shown: {}, lambda shown: {"canvas": shown["canvas"]}]
)
def test_what_diffusers_callbacks_return_unchanged_is_taken(kind: str, returned: Any) -> None:
    pipe = pipeline(kind)
    out = pipe(
        told(pipe, 1), seed=0, output_type="np", callback_on_step_end=lambda p, i, n, shown: returned(shown)
    )
    assert np.array_equal(out.images, pipe(told(pipe, 1), seed=0, output_type="np").images)


@on_kinds
def test_a_callback_that_is_no_function_is_found_before_the_call(kind: str) -> None:
    with pytest.raises(InputError, match=r"must be a function or None, got list\.$"):
        pipeline(kind)(told(pipeline(kind), 1), callback_on_step_end=[1])


@on_kinds
def test_what_a_callback_is_shown_is_its_own(kind: str) -> None:
    """It can be changed in place and learned from; the image does not notice."""
    pipe = pipeline(kind)
    weight = torch.ones((), requires_grad=True)

    def change(pipe: Any, step: int, tokens: int, shown: dict[str, Any]) -> None:
        assert not torch.is_grad_enabled(), "as in callbacks of diffusers"
        shown["canvas"].tokens.zero_()
        shown["canvas"].written.fill_(1)
        shown["written"]().add_(1)
        with torch.enable_grad():
            (shown["preview"]().mul_(2).mean() * weight).backward()

    out = pipe(told(pipe, 1), seed=0, output_type="pt", callback_on_step_end=change)
    assert weight.grad is not None
    assert torch.equal(out.images, pipe(told(pipe, 1), seed=0, output_type="pt").images)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("c2i", {}),
        ("c2i", {"accelerator": "zipar"}),
        ("var-class", {}),
        ("var-class", {"smooth": True}),
        ("infinity", {"accelerator": "code"}),
        ("mar-class", {}),
        ("mar-class", {"accelerator": "cspd"}),
    ],
)
def test_previews_are_of_their_pass_whenever_and_wherever_they_are_asked_for(
    kind: str, options: dict[str, Any]
) -> None:
    pipe = pipeline(kind)
    alone = pipe(told(pipe, 1), seed=0, output_type="np", **options)
    at_once: list[Any] = []
    later: list[dict[str, Any]] = []

    def watch(pipe: Any, step: int, tokens: int, shown: dict[str, Any]) -> None:
        at_once.append((in_thread(shown["preview"]), shown["written"]().clone()))
        later.append(shown)

    out = pipe(told(pipe, 1), seed=0, output_type="np", callback_on_step_end=watch, **options)
    assert np.array_equal(out.images, alone.images), "previews change nothing"
    assert np.allclose(at_once[-1][0], alone.images, atol=1e-6)
    assert len(at_once) > 1
    assert not np.array_equal(at_once[0][0], at_once[-1][0])
    for (image, written), shown in zip(at_once, later, strict=True):
        assert np.allclose(shown["preview"](), image, atol=1e-6)
        assert torch.equal(in_thread(shown["written"]), written)
        assert int((shown["canvas"].written > 0).sum()) == int((written > 0).sum())


# -- what a call returns -------------------------------------------------------------------------------


@on_kinds
@pytest.mark.parametrize("output_type", ["pt", "raw", "latent", "np"])
@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_call_returns_can_be_changed(kind: str, output_type: str, stopped: bool) -> None:
    pipe = pipeline(kind)
    callback = stop if stopped else None
    for return_dict in (True, False):
        out = pipe(
            told(pipe, 1),
            seed=0,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback,
        )
        images = out[0]
        before = copy.deepcopy(images)
        images += 1
        assert (images == before + 1).all()
        if return_dict:
            assert (out.written.add_(1) > 0).all()
    again = pipe(told(pipe, 1), seed=0, output_type=output_type, callback_on_step_end=callback).images
    assert (again == before).all(), "nothing of it is kept"


@on_kinds
@pytest.mark.parametrize("output_type", ["pt", "raw", "latent"])
def test_what_a_call_returns_can_be_learned_from(kind: str, output_type: str) -> None:
    images = pipeline(kind)(told(pipeline(kind), 1), seed=0, output_type=output_type).images
    assert not images.requires_grad
    if images.is_floating_point():
        reward = nn.Conv2d(images.shape[1], 1, 1)
        reward(images).sum().backward()
        assert reward.weight.grad is not None
        images.requires_grad_()
        reward(images).sum().backward()
        assert images.grad is not None
    else:
        table = nn.Embedding(24, 2)
        table(images).sum().backward()
        assert table.weight.grad is not None


def test_an_inpainted_image_can_be_changed_and_learned_from() -> None:
    pipe = pipeline("var-class")
    out = pipe.inpaint(*half_image(pipe.image_size), 1, seed=0, output_type="pt")
    nn.Conv2d(3, 1, 1)(out.images.clamp_(0, 1)).sum().backward()
    out.written.zero_()


@on_kinds
def test_inside_the_callers_inference_mode(kind: str) -> None:
    """What is kept for later calls is no tensor of the caller's mode."""
    pipe = new_pipeline(kind)
    with torch.inference_mode():
        inside = pipe(
            told(pipe, 1), seed=0, output_type="pt", callback_on_step_end=lambda *a: a[3]["preview"]()
        ).images
        assert inside.is_inference()
    outside = pipe(told(pipe, 1), seed=0, output_type="pt").images
    assert torch.equal(inside, outside)
    outside.clamp_(0, 1)


# -- networks left in training -------------------------------------------------------------------------


def with_dropout(kind: str) -> Any:
    """A pipeline that would draw by chance what its networks' dropout makes of it."""
    pipe = new_pipeline(kind)
    for network in pipe.components.values():
        for module in network.modules() if isinstance(network, nn.Module) else ():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, _, out: nn.functional.dropout(out, 0.5, m.training))
    return pipe


@pytest.mark.parametrize("kind", [*KINDS, "t2i", "var-caption", "mar-caption"])
def test_networks_left_in_training_draw_as_in_eval_mode(kind: str) -> None:
    """And stay in training: a run that draws samples goes on as before."""
    pipe, prompt = with_dropout(kind), PROMPTS[kind][0]
    expected = pipe(prompt, seed=0, output_type="pt").images
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for network in networks:
        network.train()
    frozen = next(module for module in networks[0].modules() if isinstance(module, nn.Linear)).eval()
    previews: list[Tensor] = []
    shown: dict[str, Any] = {}
    for accelerator in (None, {"c": "jacobi", "t": "jacobi", "v": "code", "i": "code", "m": "cspd"}[kind[0]]):
        out = pipe(
            prompt,
            seed=0,
            output_type="pt",
            accelerator=accelerator,
            callback_on_step_end=lambda *a: shown.update(a[3]),
        )
        previews.append(shown["preview"]())
        assert torch.equal(out.images, previews[-1])
        if accelerator is None:
            assert torch.equal(out.images, expected)
        assert all(n.training for n in networks)
        assert not frozen.training
    with pytest.raises(InputError):
        pipe(prompt, seed=0, accelerator="plain", callback_on_step_end=lambda *a: {"latents": 1})
    assert all(n.training for n in networks)


@pytest.mark.parametrize(
    ("kind", "accelerator"),
    [
        ("c2i", lambda p: Speculative(drafter=p.transformer)),
        ("c2i", lambda p: Speculative(drafter=p)),
        ("var-class", lambda p: CoDe(refiner=p.refiner)),
        ("infinity", lambda p: CoDe(refiner=p.refiner)),
        ("mar-class", lambda p: CSpD(drafter=p.draft_transformer)),
    ],
)
def test_networks_that_an_accelerator_brings_draw_in_eval_mode(kind: str, accelerator: Any) -> None:
    pipe, other = new_pipeline(kind), with_dropout(kind)
    chosen = accelerator(other)
    expected = pipe(told(pipe, 1), seed=0, output_type="latent", accelerator=chosen).images
    other.transformer.train()
    for drafter in other.drafters.values():
        drafter.train()
    out = pipe(told(pipe, 1), seed=0, output_type="latent", accelerator=chosen)
    assert torch.equal(out.images, expected)
    assert other.transformer.training


def test_an_image_is_inpainted_in_eval_mode() -> None:
    pipe = with_dropout("var-class")
    for module in pipe.vq_model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: nn.functional.dropout(out, 0.5, m.training))

    def inpainted() -> Any:
        return pipe.inpaint(*half_image(pipe.image_size), 1, seed=0, output_type="latent").images

    expected = inpainted()
    pipe.vq_model.train()
    assert torch.equal(inpainted(), expected)
    assert pipe.vq_model.training
