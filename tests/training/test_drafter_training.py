"""The drafter's trainer: what it reads, what it optimises, that it learns, resumes and refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from tests.tiny import GRID, VOCAB_SIZE, new_pipeline, transformer, vq_model
from tests.toys import HOSTS, PROMPTS, toy_logits, toy_pipeline
from varaccel.accelerators.speculative import Speculative
from varaccel.cli import train as commands
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.guidance import Guidance
from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.signature import Signature
from varaccel.scenes.cache import write_cache
from varaccel.training import drafter as trainer
from varaccel.training.conditions import prompt_condition
from varaccel.training.drafter import (
    DrafterRecipe,
    acceptance,
    distribution_logits,
    distribution_losses,
    drafter_losses,
    predictions,
    train_drafter,
)
from varaccel.training.feature_pairs import (
    Conditions,
    Pairs,
    checked_token_ids,
    grids_of,
    make_pairs,
    new_head,
)
from varaccel.training.run import Budget, TrainingRun
from varaccel.training.token_ids import encode_cache

SAMPLES = 40
N = GRID**2
RECIPE = DrafterRecipe(batch_size=8, warmup_steps=5, ema_decay=0.8, lr=3e-3, distribution_weight=1.0)
EXACT = dataclasses.replace(RECIPE, precision="float32", warmup_steps=1, decay=1e-9)
"""In float32, with a learning rate that does not depend on the budget."""


def data(model_type: str) -> tuple[Tensor, Conditions]:
    """Images and conditions at random: a drafter learns about its target, not about images."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (SAMPLES, N), generator=generator)
    if model_type == "c2i":
        labels = torch.arange(SAMPLES) % 5
        return token_ids, lambda indices: (labels[indices], None)
    features = torch.randn(SAMPLES, 8, 16, generator=generator)
    mask = torch.arange(8) >= torch.arange(SAMPLES).remainder(6)[:, None]
    return token_ids, lambda indices: (features[indices], mask[indices])


def fresh(target: LlamaGenTransformer) -> EagleHead:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return EagleHead.for_target(target)


def train(
    folder: Path, steps: int, recipe: DrafterRecipe = RECIPE, model_type: str = "t2i"
) -> tuple[EagleHead, TrainingRun]:
    target = transformer(model_type)
    head = fresh(target)
    token_ids, condition = data(model_type)
    run = train_drafter(
        head, target, token_ids, condition, folder, budget=Budget(steps=steps), recipe=recipe, validation=8
    )
    return head, run


def some_pairs(target: LlamaGenTransformer, guided: bool, count: int = 3) -> Pairs:
    token_ids, condition = data(target.config.model_type)
    indices = torch.arange(count)
    given = Condition(*condition(indices))
    return make_pairs(target, target.transform, given, token_ids[indices], guided, grids=grids_of(target))


def same_weights(a: EagleHead, b: EagleHead) -> None:
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_pairs_are_the_targets_features(model_type: str) -> None:
    """Feature t is beside the token of slot t + 1, and the target's head reads the next distribution off `wanted`."""
    target = transformer(model_type)
    pairs = some_pairs(target, guided=True)
    token_ids, condition = data(model_type)
    features, mask = condition(torch.arange(3))
    prefix = target.prefix_length
    assert pairs.tokens.shape == (2, 3, prefix - 1 + N - 1)
    assert not pairs.tokens[:, :, : prefix - 1].any()
    assert torch.equal(pairs.tokens[0, :, prefix - 1 :], token_ids[:3, :-1])
    assert pairs.wanted.shape == (2, 3, N - 1, 32)
    for branch, given in enumerate((features, target.unconditional(features))):
        logits = target(given, token_ids[:3, :-1], mask)
        torch.testing.assert_close(target.logits(pairs.wanted[branch]), logits[:, prefix:], atol=1e-4, rtol=0)
        before = target.logits(pairs.features[branch])
        torch.testing.assert_close(before, logits[:, :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_guesses_in_a_row_are_those_of_drafting(model_type: str) -> None:
    """Three guesses from every start at once are what a cache gives that is fed one start at a time."""
    target = transformer(model_type)
    head = fresh(target)
    pairs = some_pairs(target, guided=True)
    with torch.no_grad():
        drafts = predictions(head, head.transform, pairs, depth=3)
    tokens, features = pairs.tokens.flatten(0, 1), pairs.features.flatten(0, 1)
    prefix, length = pairs.prefix, tokens.shape[1]
    table = head.rotary_table(length)
    for start in (0, 1, 6):  # the image token of the last true pair
        cache, feature = head.new_cache(tokens.shape[0], length), None
        for number in range(3):
            last = prefix + start + number
            slots = torch.arange(0 if feature is None else last, last + 1)
            read = features[:, slots] if feature is None else feature
            attention = AttentionInputs(
                table[slots],
                mask=slots[:, None] >= torch.arange(last + 1),
                cache=cache,
                slots=slots,
                length=last + 1,
            )
            with torch.no_grad():
                feature = head.transform(head.fuse(tokens[:, slots], read), attention)[:, -1:]
            # entry `start` of the guess of this number begins there
            got = drafts[number].flatten(0, 1)[:, start : start + 1]
            torch.testing.assert_close(got, feature, atol=1e-5, rtol=1e-5)


def test_losses_are_the_published_ones() -> None:
    """Written out: smooth L1 on features, cross-entropy of guided distributions, the first pair left out or not."""
    target = transformer("t2i")
    head = fresh(target)
    pairs = some_pairs(target, guided=True)
    draft_token = predictions(head, head.transform, pairs)[0].detach()
    for masked in (False, True):
        recipe = dataclasses.replace(
            RECIPE, guidance_scale=3.0, temperature=0.5, mask_first_pair=masked, unroll=2
        )
        feature, distribution = drafter_losses(target, pairs.wanted, [draft_token], recipe)
        skip = int(masked)
        torch.testing.assert_close(
            feature, torch.nn.functional.smooth_l1_loss(draft_token[:, :, skip:], pairs.wanted[:, :, skip:])
        )
        p, q = (
            (Guidance(3.0).combine(*target.logits(f[:, :, skip:])) / 0.5).softmax(-1)
            for f in (pairs.wanted, draft_token)
        )
        torch.testing.assert_close(distribution, -(p * q.log()).sum(-1).mean(), atol=1e-4, rtol=1e-4)
        if not masked:
            chance = acceptance(target, pairs.wanted, [draft_token], recipe)
            torch.testing.assert_close(chance[0], 1 - 0.5 * (p - q).abs().sum(-1).mean(), atol=1e-4, rtol=0)


def test_wide_codebooks_are_computed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither losses nor gradients depend on how many images are held at a time."""
    target = transformer("c2i").requires_grad_(False)
    head = fresh(target)
    pairs = some_pairs(target, guided=True, count=5)
    recipe = dataclasses.replace(RECIPE, guidance_scale=2.0)

    def gradient() -> tuple[Tensor, Tensor]:
        head.zero_grad()
        losses = distribution_losses(
            target, pairs.wanted, predictions(head, head.transform, pairs, 2), recipe
        )
        losses.sum().backward()
        return losses.detach(), head.fc.weight.grad.clone()

    whole = gradient()
    monkeypatch.setattr(trainer, "_DISTRIBUTION_ENTRIES", 2 * VOCAB_SIZE * N)
    torch.testing.assert_close(gradient(), whole)


@pytest.mark.parametrize(("scale", "noise", "unroll"), [(1.0, 0.1, 1), (2.0, 0.1, 2)])
def test_accumulation_equals_the_big_batch(tmp_path: Path, scale: float, noise: float, unroll: int) -> None:
    """Four parts of two images are one step of eight: same steps, same weights."""
    recipe = dataclasses.replace(EXACT, guidance_scale=scale, noise=noise, unroll=unroll)
    whole, run = train(tmp_path / "whole", 4, recipe)
    parts, split = train(tmp_path / "parts", 4, dataclasses.replace(recipe, accumulate=4))
    assert run.step == split.step == 4
    assert run.history()[0]["grad_norm"] == pytest.approx(split.history()[0]["grad_norm"], rel=1e-4)
    same_weights(whole, parts)


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    recipe = dataclasses.replace(EXACT, noise=0.1, condition_dropout=0.3)
    train(tmp_path / "parts", 3, recipe)
    parts, _ = train(tmp_path / "parts", 7, recipe)
    whole, _ = train(tmp_path / "whole", 7, recipe)
    same_weights(whole, parts)
    with pytest.raises(CheckpointError, match="other settings \\(recipe\\)"):
        train(tmp_path / "parts", 9, RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "scale"), [("t2i", 1.0), ("t2i", 2.5), ("c2i", 1.0), ("c2i", 2.5)])
def test_learns_its_target(tmp_path: Path, model_type: str, scale: float) -> None:
    """The loss falls and the chance of acceptance rises, at every depth; nothing frozen moves."""
    recipe = dataclasses.replace(RECIPE, guidance_scale=scale)
    target = transformer(model_type)
    target.tok_embeddings.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    head = fresh(target)
    embedding = head.embed_tokens.weight.clone()
    token_ids, condition = data(model_type)

    def more(steps: int) -> dict[str, float]:
        budget = Budget(steps=steps)
        run = train_drafter(
            head, target, token_ids, condition, tmp_path, budget=budget, recipe=recipe, validation=8
        )
        return run.history()[-1]

    start, end = more(1), more(60)
    assert end["ema_validation_loss"] < 0.7 * start["ema_validation_loss"]
    for depth in (1, 2, 3):
        assert end[f"ema_validation_acceptance_{depth}"] > start[f"ema_validation_acceptance_{depth}"] + 0.3
    assert torch.equal(head.embed_tokens.weight, embedding)
    assert not head.training
    assert not target.training
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not target.tok_embeddings.weight.requires_grad
    assert target.output.weight.requires_grad
    assert all(p.grad is None for p in target.parameters())


def toy_data(name: str) -> tuple[Tensor, Conditions, tuple[Grid, ...]]:
    """Images of a host that is not LlamaGen, without ends of line, and conditions as its pipeline makes them."""
    pipe = toy_pipeline(name)
    grids = pipe._grids(None)  # type: ignore[arg-type]
    cells = sum(grid.height * grid.width for grid in grids)
    token_ids = torch.randint(2, (SAMPLES, cells), generator=torch.Generator().manual_seed(0))
    prompts = [PROMPTS[name][i % 3] for i in range(SAMPLES)]

    def condition(indices: Tensor) -> Condition:
        found = pipe._condition([prompts[i] for i in indices.tolist()])
        assert found is not None
        return found

    return token_ids, condition, grids


@pytest.mark.parametrize("name", HOSTS)
def test_learns_any_causal_network(name: str, tmp_path: Path) -> None:
    """More draft tokens are accepted than of an untrained head, measured in training and in drawing."""
    pipe, (token_ids, condition, grids) = toy_pipeline(name), toy_data(name)
    target = pipe.transformer
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = new_head(target, token_ids, condition, grids=grids)
    untrained = copy.deepcopy(head).eval()
    recipe = dataclasses.replace(
        RECIPE, guidance_scale=2.0, unroll=2, lr=1e-2, precision="float32", accumulate=2
    )

    def more(steps: int) -> dict[str, float]:
        run = train_drafter(
            head,
            target,
            token_ids,
            condition,
            tmp_path,
            budget=Budget(steps=steps),
            recipe=recipe,
            grids=grids,
            validation=8,
        )
        return run.history()[-1]

    start, end = more(1), more(60)
    assert end["ema_validation_loss"] < 0.8 * start["ema_validation_loss"]
    for depth in (1, 2):
        key = f"ema_validation_acceptance_{depth}"
        assert end[key] > start[key] + 0.15 * (1 - start[key])
    assert all(p.grad is None for p in target.parameters())

    def accepted(drafter: EagleHead) -> float:
        out = pipe(
            PROMPTS[name],
            num_images_per_prompt=32,
            seed=0,
            guidance_scale=2.0,
            accelerator=Speculative(drafter, tree=3),
            output_type="latent",
        )
        return float(out.stats.mean_accepted)

    assert accepted(head) > accepted(untrained)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("guided", [False, True])
def test_pairs_of_any_causal_network(name: str, guided: bool) -> None:
    """The target's head reads the logits off the features that a full pass over each unpadded branch gives."""
    pipe, (token_ids, condition, grids) = toy_pipeline(name), toy_data(name)
    target, indices = pipe.transformer, torch.arange(3)
    tokens = checked_token_ids(token_ids[indices], target, grids)
    given = condition(indices)
    pairs = make_pairs(target, target.transform, given, tokens, guided, grids=grids)
    recipe = dataclasses.replace(RECIPE, guidance_scale=2.0)
    possible = target.possible_tokens(torch.arange(1, tokens.shape[1]), grids)
    with torch.no_grad():
        logits = distribution_logits(target, pairs.wanted, recipe, possible)
        for row in indices.tolist():
            expected = toy_logits(name, PROMPTS[name][row], 2.0 if guided else 1.0)(tokens[row : row + 1])
            torch.testing.assert_close(
                logits[row].softmax(-1), expected[0, 1:].softmax(-1), atol=1e-5, rtol=1e-4
            )
        # without its condition an image is read as the unconditional branch reads it
        both = make_pairs(target, target.transform, given, tokens, True, grids=grids)
        dropped = torch.tensor([False, True, False])
        mixed = make_pairs(target, target.transform, given, tokens, False, grids=grids, dropped=dropped)
    torch.testing.assert_close(mixed.wanted[0, 1], both.wanted[1, 1])
    torch.testing.assert_close(mixed.wanted[0, ::2], both.wanted[0, ::2])


@pytest.mark.parametrize("name", HOSTS)
def test_drafts_in_a_row_are_those_of_the_reader(name: str) -> None:
    """Padded prompts count for nothing: three images together have the predictions of each alone."""
    pipe, (token_ids, condition, grids) = toy_pipeline(name), toy_data(name)
    target, head = pipe.transformer, pipe.eagle_head
    tokens = checked_token_ids(token_ids, target, grids)

    def drafted(indices: Tensor) -> list[Tensor]:
        pairs = make_pairs(target, target.transform, condition(indices), tokens[indices], False, grids=grids)
        with torch.no_grad():
            return predictions(head, head.transform, pairs, depth=3)

    together = drafted(torch.arange(3))
    for row in range(3):
        for ours, alone in zip(together, drafted(torch.tensor([row])), strict=True):
            torch.testing.assert_close(ours[:, row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_prompts_that_the_network_reads_itself() -> None:
    """Their condition is the pipeline's own, padded to the longest of the batch, the negative one included."""
    pipe = toy_pipeline("prompted")
    found = prompt_condition(["3", "1412", "22"], pipe, "cpu")(torch.tensor([2, 0]))
    expected = pipe._condition(["22", "3"])
    assert expected is not None
    assert found.branches == expected.branches == 2
    for ours, theirs in zip((found, *found.negatives), (expected, *expected.negatives), strict=True):
        assert torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.mask, theirs.mask)


def test_noise_does_not_depend_on_the_longest_prompt(tmp_path: Path) -> None:
    """Prompts of different length, a batch whole and in parts: the same step."""
    target, (token_ids, condition, grids) = toy_pipeline("prompted").transformer, toy_data("prompted")
    recipe = dataclasses.replace(EXACT, noise=0.5)
    trained = []
    for accumulate in (1, 4):
        head = copy.deepcopy(toy_pipeline("prompted").eagle_head)
        train_drafter(
            head,
            target,
            token_ids,
            condition,
            tmp_path / str(accumulate),
            budget=Budget(steps=2),
            recipe=dataclasses.replace(recipe, accumulate=accumulate),
            grids=grids,
            validation=0,
        )
        trained.append(head)
    same_weights(*trained)


def test_grids_that_the_call_decides_must_be_given() -> None:
    target = toy_pipeline("lined").transformer
    grids = toy_data("lined")[2]
    assert checked_token_ids(torch.zeros(1, 4, dtype=torch.int64), target, grids).tolist() == [[0, 0, 3] * 2]
    with pytest.raises(InputError, match="images of 6 tokens"):
        checked_token_ids(torch.zeros(1, 5, dtype=torch.int64), target, grids)

    class Undecided(type(target)):  # type: ignore[misc]
        def signature(self) -> Signature:
            return dataclasses.replace(super().signature(), layout=None)

    with pytest.raises(InputError, match="pass the grids"):
        grids_of(Undecided())


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="multiple of accumulate"):
        DrafterRecipe(batch_size=8, accumulate=3)
    for wrong in ({"temperature": 0.0}, {"unroll": 0}, {"precision": "float16"}):
        with pytest.raises(InputError):
            DrafterRecipe(**wrong)
    target, (token_ids, condition) = transformer("t2i"), data("t2i")
    fit: dict = {"budget": Budget(steps=1), "recipe": RECIPE, "validation": 8}
    with pytest.raises(InputError, match="made for another model"):
        train_drafter(fresh(transformer("c2i")), target, token_ids, condition, tmp_path, **fit)
    with pytest.raises(InputError, match="images of 16 tokens"):
        train_drafter(fresh(target), target, token_ids[:, 1:], condition, tmp_path, **fit)
    with pytest.raises(InputError, match="the target has 24"):
        train_drafter(fresh(target), target, token_ids + 20, condition, tmp_path, **fit)
    with pytest.raises(InputError, match="do not fill a batch"):
        train_drafter(fresh(target), target, token_ids[:12], condition, tmp_path, **fit)
    assert not list(tmp_path.iterdir())


# -- the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny pipelines and a few encoded scenes of their image size."""
    folder = tmp_path_factory.mktemp("workshop")
    image_tokenizer = vq_model(channel_multipliers=(1, 1, 2))  # scenes have at least 16 pixels a side
    for model_type in ("t2i", "c2i"):
        pipe = new_pipeline(model_type)
        pipe.register_modules(vq_model=image_tokenizer)
        pipe.save_pretrained(folder / model_type)
    write_cache(folder / "scenes", first_seed=0, count=24, size=pipe.image_size, progress=False)
    encode_cache(
        image_tokenizer, folder / "scenes", folder / "token-ids", precision="float32", progress=False
    )
    np.save(folder / "labels.npy", np.arange(24, dtype=np.uint8) % 5)
    return folder


@pytest.fixture
def command(workshop: Path, tmp_path: Path) -> Callable[..., tuple[str, BaseException | None]]:
    def run(*arguments: object, target: str = "t2i") -> tuple[str, BaseException | None]:
        sizes = ("--steps", 3, "--batch-size", 4, "--validation", 4, "--out", tmp_path / "run")
        line = (
            "drafter",
            "--target",
            workshop / target,
            "--token-ids",
            workshop / "token-ids",
            *sizes,
            *arguments,
        )
        result = CliRunner().invoke(commands.train_app, list(map(str, line)))
        return result.output, result.exception

    return run


def test_command_has_the_defaults_of_the_recipe() -> None:
    recipe = {field.name: field.default for field in dataclasses.fields(DrafterRecipe)}
    options = {name: p.default for name, p in inspect.signature(commands.drafter).parameters.items()}
    shared = recipe.keys() & options.keys() - {"guidance_scale", "temperature"}  # these are the target's own
    assert {name: recipe[name] for name in shared} == {name: options[name] for name in shared}
    assert len(shared) == 7


@pytest.mark.slow
def test_command_trains_and_installs(
    command: Callable[..., tuple[str, BaseException | None]], workshop: Path, tmp_path: Path
) -> None:
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "README.md").write_text("a card")
    output, error = command("--scenes", workshop / "scenes", "--install", tmp_path / "installed")
    assert error is None, output
    assert "3 steps" in output
    assert "chance that draft token 1, 2, 3" in output
    target = LlamaGenTransformer.from_pretrained(workshop / "t2i" / "transformer")
    exported = EagleHead.from_pretrained(tmp_path / "run" / "export")
    exported.check_fits(target)
    for folder, dtype in (
        (tmp_path / "run" / "export", torch.float32),
        (tmp_path / "installed", torch.float16),
    ):
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype}
    assert (tmp_path / "installed" / "README.md").read_text() == "a card"


def test_command_trains_for_classes(
    command: Callable[..., tuple[str, BaseException | None]], workshop: Path, tmp_path: Path
) -> None:
    output, error = command("--labels", workshop / "labels.npy", "--guidance-scale", 1, target="c2i")
    assert error is None, output
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_command_errors_are_one_sentence(
    command: Callable[..., tuple[str, BaseException | None]], workshop: Path, tmp_path: Path
) -> None:
    scenes = ("--scenes", workshop / "scenes")

    def message(*arguments: object, target: str = "t2i") -> str:
        _, error = command(*arguments, target=target)
        assert isinstance(error, (InputError, CheckpointError)), error
        return str(error)

    assert "pass --scenes" in message()
    assert "pass --labels" in message(target="c2i")
    assert "temperature" in message(*scenes, "--temperature", 0)
    assert "at least 1" in message(*scenes, "--batch-size", 0)
    assert "no token ids" in message(*scenes, "--token-ids", tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(24))
    assert "the labels go from 0 to 23" in message("--labels", tmp_path / "labels.npy", target="c2i")
    np.save(tmp_path / "labels.npy", np.arange(5))
    assert "5 labels for 24 images" in message("--labels", tmp_path / "labels.npy", target="c2i")
    assert "cannot be read" in message("--labels", tmp_path / "none.npy", target="c2i")
    manifest = (workshop / "token-ids" / "manifest.json").read_text()
    own = manifest.split('"tokenizer": "')[1][:16]
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text(manifest.replace(own, "0" * 16))
    (other / "token-ids-00000.npy").write_bytes((workshop / "token-ids" / "token-ids-00000.npy").read_bytes())
    assert "another image tokenizer" in message(*scenes, "--token-ids", other)
