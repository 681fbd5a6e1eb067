"""Continuous batching: an image that takes the place of a finished one is what it is alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.enumeration import LIMIT, Setting, misfit
from tests.tiny import drafting_pipeline
from varaccel.accelerators import Accelerator
from varaccel.accelerators.jacobi import Jacobi
from varaccel.accelerators.lantern import Lantern
from varaccel.accelerators.plain import Plain
from varaccel.accelerators.speculative import Speculative
from varaccel.accelerators.zipar import ZipAR
from varaccel.engine.loop import Step
from varaccel.engine.randomness import GumbelNoise, Randomness, Stream, image_generators
from varaccel.hosts.causal import cache_slots
from varaccel.hosts.causal.cache_slots import CacheSlots
from varaccel.nn.kv_cache import KVCache
from varaccel.speculation import batch as batching
from varaccel.speculation.eagle_drafter import EagleReader
from varaccel.speculation.jacobi_proposer import JacobiProposer
from varaccel.speculation.network_drafter import NetworkReader
from varaccel.speculation.proposers import StaticProposer
from varaccel.speculation.tree import DynamicTree

DYNAMIC = DynamicTree(top_k=3, depth=2, total=9)
BUSHY = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]
ACCELERATORS: dict[str, Accelerator] = {
    "jacobi": Jacobi(4),
    "jacobi none": Jacobi(5, "none"),
    "jacobi maximal random": Jacobi(4, "maximal", "random"),
    "jacobi rows": Jacobi(3, row_window=2),
    "eagle chain": Speculative("eagle", tree=3),
    "eagle tree": Speculative("eagle", tree=BUSHY),
    "eagle dynamic": Speculative("eagle", tree=DYNAMIC),
    "eagle adaptive rows": Speculative("eagle", tree=BUSHY, adaptive=True, row_window=2),
    "small adaptive": Speculative("small", tree=6, adaptive=True),
    "small gumbel": Speculative("small", tree=BUSHY, verification="gumbel"),
    "small dynamic": Speculative("small", tree=DYNAMIC),
    "small k_sequential rows": Speculative("small", tree=4, verification="k_sequential", row_window=2),
    "layers matching": Speculative("layers", tree=5, verification="matching"),
    "layers tree": Speculative("layers", tree=BUSHY),
    "lantern": Lantern(k=5, delta=0.2, drafter="small", tree=BUSHY),
    "lantern eagle": Lantern(k=5, multiplier=3.0, drafter="eagle", tree=4),
}
PROMPTS: dict[str, list[str | int]] = {
    "c2i": [0, 4, 2, 2, 1, 3, 0],
    "t2i": [
        "a red sphere",
        "sphere",
        "a blue cube left of a red sphere",
        "a cube",
        "red",
        "a red cube of blue",
        "a blue sphere left of a cube",
    ],
}
DISTRIBUTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("c2i", {"guidance_scale": 1.0}),
    ("t2i", {"guidance_scale": 2.5}),
    ("t2i", {"guidance_scale": 2.5, "guidance_interval": 5}),
)
FREE, GUIDED, HALF_GUIDED = range(3)
GUIDED_IMAGES = Setting("t2i", 2.5, interval=3)
named = pytest.mark.parametrize("name", ACCELERATORS)


def draw(name: str, distribution: int, prompts: Any = None, **options: Any) -> Any:
    host, options_of = DISTRIBUTIONS[distribution]
    return drafting_pipeline(host)(
        PROMPTS[host] if prompts is None else prompts,
        accelerator=ACCELERATORS[name],
        output_type="latent",
        **{"seed": 5, **options_of, **options},
    )


@cache
def alone(name: str, distribution: int) -> list[Any]:
    """Each prompt drawn alone with its seed."""
    prompts = PROMPTS[DISTRIBUTIONS[distribution][0]]
    return [draw(name, distribution, prompt, seed=5 + i) for i, prompt in enumerate(prompts)]


def unlike(out: Any, name: str, distribution: int) -> list[str]:
    """What differs between images drawn together and the same drawn alone."""
    found = []
    for index, one in enumerate(alone(name, distribution)):
        pairs = {
            "tokens": torch.equal(out.images[index], one.images[0]),
            "written": torch.equal(out.written[index], one.written[0]),
            "passes": out.stats.image_passes[index] == one.stats.image_passes[0],
            "accepted": out.stats.accepted[index] == one.stats.accepted[0],
        }
        found += [f"{what} of image {index}" for what, same in pairs.items() if not same]
    return found


SLOW = pytest.mark.slow


@named
@pytest.mark.parametrize(
    ("distribution", "sizes"),
    [
        pytest.param(FREE, (1, 2, 3), marks=SLOW, id="free"),
        pytest.param(GUIDED, (1, 2, 3), marks=SLOW, id="guided"),
        pytest.param(HALF_GUIDED, (3, None), id="half guided"),
    ],
)
def test_images_are_those_of_each_prompt_alone(name: str, distribution: int, sizes: Any) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for batch_size in sizes:
        out = draw(name, distribution, batch_size=batch_size)
        assert unlike(out, name, distribution) == []
        stats = out.stats
        assert (stats.images, stats.batch_size) == (7, batch_size or 7)
        assert stats.rows == (batch_size or 7) * (1 if distribution == FREE else 2)
        if batch_size == 1:
            assert stats.passes == sum(stats.image_passes)
        elif batch_size is None:
            assert stats.passes == max(stats.image_passes)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_place_is_taken_as_soon_as_it_is_free() -> None:
    for batch_size in (2, 3):
        stats = draw("jacobi", GUIDED, batch_size=batch_size).stats
        # as a queue serves it: each image goes to the row that is free first
        ends = [0] * batch_size
        for count in stats.image_passes:
            ends[ends.index(min(ends))] += count - 1  # without the pass that reads its condition
        # the conditions of the first images are read in one pass, those of the others one by one
        conditions = 1 + 7 - batch_size
        assert stats.passes == conditions + max(ends)


@pytest.mark.parametrize("name", ["jacobi", "eagle tree", "small adaptive", "jacobi rows"])
def test_fixed_shapes_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = drafting_pipeline("t2i")
    expected = alone(name, HALF_GUIDED)
    shapes: set[Any] = set()

    def watched(x: Tensor, attention: Any) -> Tensor:
        shapes.add((x.shape[0], x.shape[1], attention.length, attention.mask.shape[2:]))
        return pipe.transformer.transform(x, attention)

    monkeypatch.setattr(
        pipe,
        "_transforms",
        lambda network: watched if network is pipe.transformer else network.transform,
    )
    out = draw(name, HALF_GUIDED, batch_size=3)
    assert [i for i, one in enumerate(expected) if not torch.equal(out.images[i], one.images[0])] == []
    assert len(shapes) <= 2, "guided and not"


# -- what must not stay of the image before ------------------------------------------------------------

MISTAKES: dict[str, tuple[type, str, str, int]] = {
    "draft tokens": (JacobiProposer, "put_rows", "jacobi none", FREE),
    "numbers of passes": (Stream, "put_rows", "jacobi maximal random", FREE),
    "noise of positions": (GumbelNoise, "put_rows", "jacobi", FREE),
    "numbers of positions": (Randomness, "put_rows", "layers matching", FREE),
    "cache slots": (CacheSlots, "put_rows", "jacobi", GUIDED),
    "keys and values": (KVCache, "put_rows", "jacobi", GUIDED),
    "features": (EagleReader, "put_rows", "eagle chain", GUIDED),
    "the drafter's cache": (NetworkReader, "put_rows", "small dynamic", GUIDED),
    "depths": (StaticProposer, "put_rows", "small adaptive", FREE),
    "rows that were kept": (KVCache, "keep_rows", "jacobi", GUIDED),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_stays_of_another_image_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, name, distribution = MISTAKES[what]
    assert unlike(draw(name, distribution, batch_size=3), name, distribution) == []

    def mistaken(self: Any, *arguments: Any) -> None:
        if method == "keep_rows":  # the first rows instead of those that are meant
            original(self, range(len(arguments[0])))

    original = getattr(kind, method)
    monkeypatch.setattr(kind, method, mistaken)
    assert unlike(draw(name, distribution, batch_size=3), name, distribution)


@SLOW
def test_images_through_the_queue_follow_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator in (Jacobi(4, "none"), Speculative("small", tree=3)):
        out = GUIDED_IMAGES.draw(accelerator, batch_size=128)
        assert misfit(out.images, GUIDED_IMAGES.distribution) < LIMIT

    def image_after_image(images: Tensor, rows: int, batch: int) -> Tensor:
        return (images.unsqueeze(1) + torch.arange(0, rows, batch)).flatten()

    # of several images that begin at once, some would read the condition of the other branch
    monkeypatch.setattr(cache_slots, "branch_rows", image_after_image)
    out = GUIDED_IMAGES.draw(Jacobi(4, "none"), batch_size=128)
    assert misfit(out.images, GUIDED_IMAGES.distribution) > LIMIT


# -- parts ---------------------------------------------------------------------------------------------


def test_streams_are_those_of_each_image_wherever_it_begins() -> None:
    generators = image_generators(5, seed=3)
    randomness = Randomness.draw(generators, 4)
    expected = [randomness.part([i]).stream(6) for i in range(5)]
    stream = randomness.part([0, 1]).stream(6)
    rows = [0, 1]
    for number in range(40):
        for row, (begins, image) in {0: (7, 2), 1: (15, 3)}.items():
            if number == begins:
                stream.put_rows(torch.tensor([row]), randomness.part([image]).stream(6))
                rows[row] = image
        if number == 20:
            stream.put_rows(torch.tensor([0, 1]), randomness.part([4, 0]).stream(6))
            rows, expected[0] = [4, 0], randomness.part([0]).stream(6)
        if number == 30:
            stream.keep_rows(torch.tensor([1]))
            rows = rows[1:]
        numbers = stream.next()
        assert torch.equal(numbers, torch.cat([expected[image].next() for image in rows]))


def test_kept_rows_move_within_their_memory() -> None:
    cache = KVCache(
        layers=2, batch=6, heads=1, slots=3, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    keys, values, place = cache.keys.clone(), cache.values.clone(), cache.keys.data_ptr()
    cache.keep_rows([0, 2, 3, 5])
    assert torch.equal(cache.keys, keys[:, [0, 2, 3, 5]])
    assert torch.equal(cache.values, values[:, [0, 2, 3, 5]])
    assert cache.keys.data_ptr() == place
    assert cache.batch == 4


# -- the call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", [Jacobi(4), ZipAR(2), Plain()], ids=["jacobi", "zipar", "plain"])
def test_observers_see_all_images(accelerator: Accelerator) -> None:
    pipe = drafting_pipeline("t2i")
    prompts = PROMPTS["t2i"][:5]
    plain = pipe(prompts, seed=5, accelerator=accelerator, output_type="pt")
    seen: list[tuple[int, int, Any]] = []

    def watch(_: Any, step: int, decided: int, shown: dict[str, Any]) -> None:
        seen.append((step, decided, shown))

    out = pipe(
        prompts, seed=5, batch_size=2, accelerator=accelerator, output_type="pt", callback_on_step_end=watch
    )
    torch.testing.assert_close(out.images, plain.images)
    assert torch.equal(out.written, plain.written)
    assert [step for step, _, _ in seen] == list(range(out.stats.passes))
    counts = [int((shown["canvas"].written > 0).sum()) for _, _, shown in seen]
    assert counts == sorted(counts)
    assert counts[-1] == plain.written.numel()
    assert all(decided > 0 for _, decided, _ in seen)
    middle = seen[len(seen) // 2][2]
    assert middle["preview"]().shape == out.images.shape
    assert 0 < int((middle["written"]() > 0).sum()) < plain.written.numel()
    torch.testing.assert_close(seen[-1][2]["preview"](), out.images)

    def stop(pipe: Any, step: int, decided: int, shown: dict[str, Any]) -> None:
        pipe._interrupt = step == 11

    stopped = pipe(prompts, seed=5, batch_size=2, accelerator=accelerator, callback_on_step_end=stop)
    assert stopped.stats.interrupted
    assert stopped.stats.passes == 12
    assert stopped.stats.tokens == 0, "some images have not begun"
    assert len(stopped.images) == 5


def test_progress_is_that_of_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Step] = []
    tell = batching.Batch._tell

    def watched(self: Any, positions: Tensor) -> None:
        observer = self.job.on_step
        steps: list[Step] = []
        object.__setattr__(self.job, "on_step", steps.append)
        tell(self, positions)
        object.__setattr__(self.job, "on_step", observer)
        told.extend(steps)
        observer(steps[0])

    monkeypatch.setattr(batching.Batch, "_tell", watched)
    out = draw("jacobi", GUIDED, batch_size=3)
    shares = [step.progress for step in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [step.number for step in told] == list(range(1, out.stats.passes + 1))
    decided = sum((step.positions >= 0).sum(1) for step in told)
    assert torch.equal(torch.as_tensor(decided), torch.full((7,), 16))


def test_passes_are_compared_with_batches_of_the_same_size() -> None:
    pipe = drafting_pipeline("c2i")
    plain = pipe(PROMPTS["c2i"], seed=5, batch_size=3, output_type="latent").stats
    assert (plain.passes, plain.tokens_per_pass, plain.rows) == (3 * 16, 1.0, 6)
    fast = draw("jacobi", FREE, batch_size=3).stats
    assert fast.tokens_per_pass == 3 * 16 / fast.passes > 1
    at_once = draw("jacobi", FREE).stats
    assert at_once.tokens_per_pass == 16 / at_once.passes
