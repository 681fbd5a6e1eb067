"""Families of one's own: a subclass with another label, and how a family's pipelines are found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests import tiny, toys
from tests.tiny import PROMPTS, drafting_pipeline, pipeline, redraw, vq_model
from varaccel import (
    AutoPipeline,
    InputError,
    Jacobi,
    LlamaGenPipeline,
    MARPipeline,
    Plain,
    Speculative,
    VARPipeline,
    ZipAR,
)
from varaccel.accelerators import ACCELERATORS, Accelerator, fitting, register
from varaccel.engine.accelerator import plan_call
from varaccel.engine.canvas import Canvas
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.sampling import Sampling
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.prefix import Prefix
from varaccel.nn.signature import Signature
from varaccel.pipelines import loading
from varaccel.pipelines.causal import CausalPipeline
from varaccel.pipelines.loading import PIPELINES


class Other(LlamaGenPipeline):
    """LlamaGen under another label, which is for people alone."""

    family: ClassVar[str] = "other"


def other(host: str) -> Other:
    pipe = drafting_pipeline(host)
    chosen = {name: pipe.config[name] for name in ("class_names", "guidance_scale")}
    made = Other(**pipe.components, **chosen)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("host", ["c2i", "t2i"])
@pytest.mark.parametrize("name", fitting(CausalJob))
def test_a_family_by_another_name_takes_every_causal_accelerator(host: str, name: str) -> None:
    ours, theirs = (
        pipe(PROMPTS[host], seed=3, accelerator=name, output_type="latent")
        for pipe in (other(host), drafting_pipeline(host))
    )
    if name != "auto":  # which chooses by a measurement of the machine
        assert ours.stats.label == theirs.stats.label
    assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("name", [name for name in ACCELERATORS if name not in fitting(CausalJob)])
def test_others_are_refused_by_label(name: str) -> None:
    with pytest.raises(InputError, match=r"does not work on other models; what does: .*jacobi"):
        other("c2i")(0, accelerator=name)


def test_a_saved_family_is_loaded_by_its_class(tmp_path: Path) -> None:
    other("c2i").save_pretrained(tmp_path / "model")
    again = AutoPipeline.from_pretrained(tmp_path / "model")
    assert type(again) is Other


def test_a_pipeline_that_has_a_network_is_a_drafter() -> None:
    pipe = drafting_pipeline("c2i")
    small = LlamaGenPipeline(pipe.draft_transformer, pipe.vq_model)
    by_pipeline, by_network = (
        pipe(1, seed=0, accelerator=Speculative(drafter, tree=3), output_type="latent")
        for drafter in (small, pipe.draft_transformer)
    )
    assert torch.equal(by_pipeline.images, by_network.images)


# -- hosts unlike the shipped ones ---------------------------------------------------------------------


class Oblong(toys.LinedHost):
    """A grid of two rows of three, told by the signature as a list, as a configuration file gives it back."""

    def signature(self) -> Signature:
        return Signature("class", self.config.num_classes, vocab_size=4, layout=[2, 3])  # type: ignore[arg-type]

    def possible_tokens(self, positions: Tensor, grids: Any) -> None:
        return None


class OblongPipeline(CausalPipeline):
    family: ClassVar[str] = "oblong"


def oblong(**options: Any) -> OblongPipeline:
    network = Oblong(width=3)
    redraw(network, 0)
    pipe = OblongPipeline(network.eval(), vq_model(codebook_size=4), guidance_scale=2.0, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_grid_need_not_be_square() -> None:
    pipe = oblong(draft_transformer=oblong().transformer)
    for name in fitting(CausalJob):
        options = {"k": 1} if name == "lantern" else {}
        out = pipe([0, 1], seed=0, accelerator=ACCELERATORS[name](**options), output_type="latent")
        assert out.images.shape == (2, 2, 3)
        assert (out.written > 0).all()
    with pytest.raises(InputError, match="no single size"):
        _ = pipe.image_size


def test_vocabularies_may_have_further_ids() -> None:
    with pytest.raises(InputError, match="predicts 5 token ids but the image tokenizer has 4"):
        toys.LinedPipeline(toys.LinedHost(vocab_size=5), vq_model(codebook_size=4))

    class Wider(toys.LinedPipeline):
        @staticmethod
        def _check_vocabulary(signature: Signature, vq_model: Any) -> None:
            assert (signature.vocab_size or 0) >= vq_model.codebook_size

    network = toys.LinedHost(vocab_size=5)
    redraw(network, 0)
    pipe = Wider(network.eval(), vq_model(codebook_size=4))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, seed=0, accelerator="jacobi", output_type="latent").written.all()
    with pytest.raises(InputError, match="no codebook of vectors"):
        pipe(1, seed=0, accelerator=ACCELERATORS["lantern"](k=1))


def test_branches_may_differ_without_a_negative_condition() -> None:
    """A network that makes the unconditional prompt by itself: what counts is the mask, not who made it."""
    pipe = toys.toy_pipeline("prompted")

    class OwnNegative(type(pipe.transformer)):  # type: ignore[misc]
        def encode_condition(self, condition: Condition, grids: Any, *, guided: bool) -> Prefix:
            ids = torch.tensor([[5, 4]]).expand(condition.batch, -1)
            own = Condition(ids, torch.ones_like(ids, dtype=torch.bool))
            return super().encode_condition(replace(condition, negative=own), grids, guided=guided)

    network = OwnNegative()
    network.load_state_dict(pipe.transformer.state_dict())
    prompts = toys.PROMPTS["prompted"]
    given = pipe._condition(prompts)
    assert given is not None
    for seed in range(4):
        for accelerator in (Jacobi(3), ZipAR(1), Plain()):
            drawn = []
            for chosen, condition in (
                (pipe.transformer, given),
                (network.eval(), replace(given, negative=None)),
            ):
                canvas = Canvas.empty(3, 9)
                job = CausalJob(
                    network=chosen,
                    canvas=canvas,
                    rows=6,
                    condition=condition,
                    grids=(Grid(3, 3),),
                    guidance=Guidance(2.0),
                    sampling=Sampling(),
                    randomness=Randomness.draw(image_generators(3, seed=seed), 9),
                )
                plan_call(accelerator, job).run()
                drawn.append(canvas.tokens)
            assert torch.equal(*drawn)


def test_a_network_with_a_part_called_transformer_is_itself() -> None:
    pipe = oblong()
    small = oblong().transformer
    small.transformer = torch.nn.Linear(1, 1)
    out = pipe(1, seed=0, accelerator=Speculative(small, tree=2), output_type="latent")
    assert out.stats.draft_passes > 0


def test_from_pipe_shares_components() -> None:
    for host in ("c2i", "t2i"):
        pipe = drafting_pipeline(host)
        again = LlamaGenPipeline.from_pipe(pipe, temperature=0.25)
        assert again.transformer is pipe.transformer
        assert again.eagle_head is pipe.eagle_head
        assert again.config.temperature == 0.25
        assert again.config.guidance_scale == pipe.config.guidance_scale
    with pytest.raises(InputError, match="has no vq_model for a LlamaGenPipeline"):
        LlamaGenPipeline.from_pipe(pipeline("mar-class"))


def test_names_that_are_taken_or_missing() -> None:
    with pytest.raises(TypeError, match="there is a pipeline class LlamaGenPipeline in varaccel"):
        type("LlamaGenPipeline", (CausalPipeline,), {})
    assert PIPELINES["LlamaGenPipeline"] is LlamaGenPipeline
    with pytest.raises(TypeError, match="must say in `job_type`"):
        register(type("Jobless", (Accelerator,), {"name": "jobless"}))
    assert "jobless" not in ACCELERATORS


def test_a_class_defined_again_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cell that runs again, or one script under two module names."""
    monkeypatch.setattr(loading, "PIPELINES", dict(PIPELINES))
    for module in ("__main__", "document", "script"):
        again = type("DefinedTwice", (CausalPipeline,), {"__module__": module})
        assert loading.PIPELINES["DefinedTwice"] is again


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OblongPipeline(torch.nn.Linear(1, 1), vq_model()), "a Linear is no transformer"),
        (lambda: OblongPipeline(tiny.var_transformer("class"), vq_model()), "is a next-scale network"),
        (lambda: VARPipeline(tiny.transformer("c2i"), tiny.multiscale_vq()), "needs a next-scale one"),
        (lambda: MARPipeline(tiny.transformer("c2i"), tiny.kl_vae()), "needs a masked one"),
        (lambda: oblong(eagle_head=oblong().transformer), "must be an EagleHead"),
        (lambda: Prefix(torch.zeros(2, 1, 4), positional=torch.zeros(5, 2)), "positional of a prefix"),
        (
            lambda: PlainPrompts(toys.host("prompted"), vq_model(codebook_size=3))("1"),
            "implement `_condition`",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(build: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


class PlainPrompts(CausalPipeline):
    """A pipeline that forgot to say what prompts mean."""
