"""`batch_size` of a call, where all images of a batch end together: one batch after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import pipeline, told
from varaccel import InputError
from varaccel.engine.counts import SpeculationStats, Stage, StageStats, added_counts

NUMBERS = [1, 2, 3, 3, 1]
FEW_STEPS = {"num_iterations": 4, "head_steps": 3}
CALLS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "plain": ("c2i", "plain", {}, 16),
    "zipar": ("c2i", "zipar", {}, 16),
    "var": ("var-class", "plain", {}, 3),
    "smooth var": ("var-class", "plain", {"smooth": True}, 3),
    "infinity": ("infinity", "plain", {}, 3),
    "mar": ("mar-class", "plain", FEW_STEPS, 4),
    "feature cache": ("mar-class", "feature_cache", FEW_STEPS, 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_batch_after_the_other(name: str) -> None:
    model, accelerator, options, _ = CALLS[name]
    pipe = pipeline(model)
    calls: dict[str, Any] = {"seed": 3, "accelerator": accelerator, "output_type": "pt", **options}
    whole = pipe([told(pipe, number) for number in NUMBERS], **calls)
    steps: list[int] = []
    previews: list[torch.Tensor] = []

    def watch(_: Any, step: int, decided: int, shown: dict[str, Any]) -> None:
        steps.append(step)
        assert decided > 0
        if step in (0, whole.stats.passes):  # in the first batch, and in the second
            previews.append(shown["preview"]())

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    parts = pipe(
        [told(pipe, number) for number in NUMBERS], batch_size=2, callback_on_step_end=watch, **calls
    )
    torch.testing.assert_close(parts.images, whole.images, atol=1e-4, rtol=1e-4)
    assert torch.equal(parts.written, whole.written)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert steps == list(range(3 * whole.stats.passes))
    assert [preview.shape for preview in previews] == [whole.images.shape] * 2
    torch.testing.assert_close(previews[1][:2], whole.images[:2], atol=1e-4, rtol=1e-4)
    stats = parts.stats
    assert (stats.images, stats.batch_size, stats.passes) == (5, 2, 3 * whole.stats.passes)
    assert stats.tokens_per_pass == whole.stats.tokens_per_pass
    assert stats.rows * 5 == whole.stats.rows * 2
    assert stats.cache_bytes * 5 == whole.stats.cache_bytes * 2
    assert "2 at once" in str(stats)
    assert "at once" not in str(whole.stats)


@pytest.mark.parametrize("name", ["plain", "var", "mar"])
def test_a_stopped_call_shows_the_batches_that_are_there(name: str) -> None:
    model, accelerator, options, passes = CALLS[name]
    pipe = pipeline(model)
    calls: dict[str, Any] = {"seed": 3, "accelerator": accelerator, "output_type": "pt", **options}

    def stop(pipe: Any, step: int, decided: int, shown: dict[str, Any]) -> None:
        pipe._interrupt = step == passes

    whole = pipe([told(pipe, number) for number in NUMBERS], **calls)
    stopped = pipe(
        [told(pipe, number) for number in NUMBERS], batch_size=2, callback_on_step_end=stop, **calls
    )
    assert stopped.stats.interrupted
    assert stopped.stats.passes == passes + 1
    assert stopped.images.shape == whole.images.shape
    torch.testing.assert_close(stopped.images[:2], whole.images[:2], atol=1e-4, rtol=1e-4)
    assert (torch.as_tensor(stopped.written)[4:] == 0).all()


def test_prompts_stay_with_their_images() -> None:
    pipe = pipeline("c2i")
    options: dict[str, Any] = {"num_images_per_prompt": 2, "seed": 3, "output_type": "latent"}
    whole = pipe([0, 4, 1], negative_prompt=[1, 2, 3], **options)
    parts = pipe([0, 4, 1], negative_prompt=[1, 2, 3], batch_size=4, **options)
    assert torch.equal(parts.images, whole.images)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(6)]
    given = pipe(
        [0, 4, 1],
        negative_prompt=[1, 2, 3],
        batch_size=1,
        generator=generators,
        **{**options, "seed": None},
    )
    assert torch.equal(given.images, whole.images)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "two"])
def test_sizes_that_are_none_are_refused(batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be"):
        pipeline("c2i")([0, 1], batch_size=batch_size)


def test_numbers_of_one_batch_are_not_split() -> None:
    pipe = pipeline("var-class")
    with pytest.raises(InputError, match="published_rng draws the numbers of one batch"):
        pipe([0, 1], batch_size=1, published_rng=True, seed=0)
    one = pipe([0, 1], batch_size=2, published_rng=True, seed=0, output_type="latent").images
    assert torch.equal(one, pipe([0, 1], published_rng=True, seed=0, output_type="latent").images)


def test_what_batches_tell_is_added_up() -> None:
    assert added_counts([3, 4]) == 7
    first = StageStats(5, (Stage("draft", 1.0, 2, 10, 100), Stage("refine", 2.0, 3, 20, 50)))
    second = StageStats(5, (Stage("draft", 0.5, 2, 10, 60), Stage("refine", 1.0, 3, 20, 70)))
    assert added_counts([first, second]) == StageStats(
        10, (Stage("draft", 1.5, 4, 10, 100), Stage("refine", 3.0, 6, 20, 70))
    )
    told = [
        SpeculationStats(torch.tensor(p), torch.tensor(p) * 2, torch.tensor(p) * 3, 4, torch.tensor(p) * 5)
        for p in ([1, 2], [3])
    ]
    added = added_counts(told)
    assert isinstance(added, SpeculationStats)
    assert added.passes.tolist() == [1, 2, 3]
    assert added.attempts.tolist() == [2, 4, 6]
    assert added.accepted.tolist() == [3, 6, 9]
    assert added.verified is not None
    assert added.verified.tolist() == [5, 10, 15]
    assert added.draft_passes == 8


@pytest.mark.parametrize("name", ["c2i", "var-class", "mar-class"])
def test_a_part_counts_its_own_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(name)
    rows: list[tuple[int, int]] = []
    run = type(pipe).job_type.decode

    def noted(job: Any) -> int:
        rows.append((job.rows, job.canvas.batch))
        return run(job)

    monkeypatch.setattr(type(pipe).job_type, "decode", noted)
    few = FEW_STEPS if name == "mar-class" else {}
    pipe([0] * 7, seed=0, batch_size=3, guidance_scale=2.0, output_type="latent", **few)
    assert rows == [(6, 3), (6, 3), (2, 1)]
