"""Families of one's own: a subclass with another label, and how a family's pipelines are found again."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.tiny import PROMPTS, drafting_pipeline
from varaccel import AutoPipeline, InputError, LlamaGenPipeline, Speculative
from varaccel.accelerators import ACCELERATORS, fitting
from varaccel.hosts.causal.job import CausalJob


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
