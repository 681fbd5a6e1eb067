"""The VAR trainers: they learn tokens and conditions, resume exactly, and refine only the scales they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from varaccel.errors import CheckpointError, InputError
from varaccel.models.var import VARTransformer
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.scenes.cache import CachedScenes, write_cache
from varaccel.tokenizers.multiscale_vq import MultiScaleQuantizer, MultiScaleVQModel
from varaccel.tokenizers.vq import VQModel
from varaccel.training.conditions import label_condition
from varaccel.training.images import to_images
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, TrainingRun
from varaccel.training.token_ids import (
    encode_cache,
    load_tokenizer,
    main,
    read_manifest,
    read_token_ids,
    token_ids_path,
)
from varaccel.training.tokens import Condition
from varaccel.training.var import (
    RefinerObjective,
    VARObjective,
    VARRecipe,
    initialise,
    optimizers,
    train_refiner,
    train_var,
)

SCALES = (1, 2, 3)
LENGTH, VOCAB_SIZE, WIDTH, CLASSES, SAMPLES = 14, 12, 4, 4, 40
RECIPE = VARRecipe(batch_size=8, warmup_steps=5, condition_dropout=0.2, ema_decay=0.8)
STEADY = VARRecipe(batch_size=8, warmup_steps=1, decay=1e-9)  # the rate must not depend on the budget


def model(seed: int = 0, **changes: object) -> VARTransformer:
    sizes: dict[str, object] = {
        "depth": 2,
        "dim": 16,
        "num_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "codebook_dim": WIDTH,
        "scales": SCALES,
        "num_classes": CLASSES,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VARTransformer(**{**sizes, **changes})


def quantizer(scales: tuple[int, ...] = SCALES, size: int = VOCAB_SIZE) -> MultiScaleQuantizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiScaleQuantizer(size, WIDTH, ScaleSchedule(scales), 4, 0.5)


def data() -> tuple[Tensor, Condition]:
    """Images of a random pattern per class."""
    labels = torch.arange(SAMPLES) % CLASSES
    patterns = torch.randint(VOCAB_SIZE, (CLASSES, LENGTH), generator=torch.Generator().manual_seed(1))
    return patterns[labels], label_condition(labels, CLASSES, "cpu")


def train(
    folder: Path, steps: int, recipe: VARRecipe = RECIPE, **options: int
) -> tuple[VARTransformer, TrainingRun]:
    trained = model()
    budget = Budget(steps=steps)
    run = train_var(
        trained, quantizer(), *data(), folder, budget=budget, recipe=recipe, validation=8, **options
    )
    return trained, run


def opinionated(seed: int) -> VARTransformer:
    """A model whose distributions are far from flat."""
    made = model(seed)
    initialise(made, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.head.weight.mul_(200)
    return made.eval()


def refiner(student: VARTransformer, teacher: VARTransformer, draft_scales: int = 2) -> RefinerObjective:
    return RefinerObjective(student, teacher, quantizer(), *data(), draft_scales=draft_scales)


@pytest.mark.slow
def test_memorises_what_belongs_to_a_condition(tmp_path: Path) -> None:
    trained, run = train(tmp_path, 200)
    last = run.history()[-1]
    assert last["ema_validation_loss"] < 0.3 < run.history()[0]["loss"]
    counts = [side * side for side in SCALES]
    scales = [last[f"ema_validation_loss_scale{s}"] for s in range(3)]
    assert last["ema_validation_loss"] == pytest.approx(np.average(scales, weights=counts), abs=1e-4)
    token_ids, _ = data()
    first = trained(torch.arange(CLASSES), torch.zeros(CLASSES, 0, WIDTH))
    assert torch.equal(first[:, 0].argmax(-1), token_ids[:CLASSES, 0]), (
        "token 0 follows from the condition alone"
    )


def test_captions_are_a_condition_too(tmp_path: Path) -> None:
    features = torch.randn(SAMPLES, 3, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(SAMPLES, 3, dtype=torch.bool)
    trained = model(condition_type="caption", caption_dim=8, shared_adaln=True)
    run = train_var(
        trained,
        quantizer(),
        data()[0],
        lambda indices: (features[indices % CLASSES], mask[indices]),
        tmp_path,
        budget=Budget(steps=80),
        recipe=RECIPE,
        validation=8,
    )
    assert run.history()[-1]["ema_validation_loss"] < 0.5 * run.history()[0]["loss"]


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    """A run in two parts is the run in one: weights, average and optimiser state."""
    train(tmp_path / "parts", 4, STEADY)
    parts, _ = train(tmp_path / "parts", 9, STEADY)
    whole, _ = train(tmp_path / "whole", 9, STEADY)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_drafter_learns_and_reads_the_leading_scales_only(tmp_path: Path) -> None:
    token_ids, condition = data()
    other = token_ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % VOCAB_SIZE
    indices, dropped = torch.arange(8), torch.zeros(8, dtype=torch.bool)
    trained = opinionated(0)
    losses = [VARObjective(trained, quantizer(), c, condition, scales=2) for c in (token_ids, other)]
    assert torch.equal(*(o.loss(indices, dropped) for o in losses))
    whole = [VARObjective(trained, quantizer(), c, condition) for c in (token_ids, other)]
    assert not torch.equal(*(o.loss(indices, dropped) for o in whole))
    expected = whole[0].validate(indices)
    for name, value in losses[0].validate(indices).items():
        if name != "loss":
            torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=2e-2)
    _, run = train(tmp_path, 3, STEADY, draft_scales=2)
    assert "ema_validation_loss_scale1" in run.history()[-1]
    assert "ema_validation_loss_scale2" not in run.history()[-1]
    with pytest.raises(CheckpointError, match=r"other settings \(draft_scales\)"):
        train(tmp_path, 4, STEADY, draft_scales=1)


def test_divergence_from_oneself_is_zero() -> None:
    indices = torch.arange(8)
    dropped = indices % 2 == 0
    same = refiner(opinionated(0), opinionated(0)).loss(indices, dropped)
    assert float(same.detach()) == pytest.approx(0, abs=1e-6)
    other = refiner(opinionated(0), opinionated(1))
    assert float(other.loss(indices, dropped).detach()) > 0.05
    values = other.validate(indices)
    assert set(values) == {"loss", "loss_scale2"}
    assert float(values["loss"]) == float(values["loss_scale2"])


def test_divergence_is_that_of_the_refined_scales_from_the_teacher() -> None:
    """KL(teacher || student), the condition missing for both alike."""
    student, teacher = opinionated(0), opinionated(1)
    indices = torch.arange(8)
    dropped = indices < 4
    token_ids, condition = data()
    labels, _ = condition(indices)
    with torch.no_grad(), autocast(torch.device("cpu")):
        inputs = quantizer().inputs(token_ids[indices])
        p, q = (m(labels, inputs, None, dropped)[:, 5:].softmax(-1) for m in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(refiner(student, teacher).loss(indices, dropped).detach(), expected)


def test_what_a_teacher_says_of_drafted_scales_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = opinionated(0), opinionated(1)
    indices, dropped = torch.arange(8), torch.zeros(8, dtype=torch.bool)

    def gradients(changed: slice | None) -> Tensor:
        honest = VARTransformer.forward

        def forward(*arguments: Tensor) -> Tensor:
            logits = honest(teacher, *arguments)
            if changed is not None:
                logits[:, changed] = logits[:, changed].flip(-1)
            return logits

        monkeypatch.setattr(teacher, "forward", forward)
        student.zero_grad()
        refiner(student, teacher).loss(indices, dropped).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    plain = gradients(None)
    assert torch.equal(gradients(slice(0, 5)), plain)
    assert not torch.equal(gradients(slice(5, 6)), plain)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_refiner_approaches_its_teacher(tmp_path: Path) -> None:
    teacher = opinionated(1)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    run = train_refiner(
        model(depth=1),
        teacher,
        quantizer(),
        *data(),
        tmp_path,
        draft_scales=1,
        budget=Budget(steps=100),
        recipe=RECIPE,
        validation=8,
    )
    assert run.history()[-1]["ema_validation_loss"] < 0.5 * run.history()[0]["loss"]
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in teacher.named_parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_initialisation(shared: bool) -> None:
    """Same seed, same weights; gates open a little; distributions close to uniform."""
    made, again = model(shared_adaln=shared, dim=64), model(1, shared_adaln=shared, dim=64)
    for each in (made, again):
        initialise(each, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))
    layer = made.shared_ada_lin[1] if shared else made.blocks[0].ada_lin[1]
    std = (1 / 64 / 3) ** 0.5
    assert float(layer.weight[:128].detach().std()) == pytest.approx(0.1 * std, rel=0.05)
    assert float(layer.weight[128:].detach().std()) == pytest.approx(0.5 * std, rel=0.05)
    assert float(made.blocks[0].attn.proj.weight.detach().std()) == pytest.approx(std / 2, rel=0.1)
    assert float(made.blocks[0].ffn.fc1.weight.detach().std()) == pytest.approx(std, rel=0.1)
    logits = made(torch.zeros(1, dtype=torch.long), torch.zeros(1, LENGTH - 1, WIDTH))
    assert float(logits.detach().abs().max()) < 0.2
    gates = made.modulate(made.embed_condition(torch.zeros(1, dtype=torch.long))).blocks[0][:2].detach()
    assert 0 < float(gates.abs().mean()) < 0.1


def test_muon_gets_the_matrices_of_attention_and_feed_forward() -> None:
    made = model()
    (muon, _), (adam, _) = optimizers(made, RECIPE)
    ours, theirs = ([p for g in o.param_groups for p in g["params"]] for o in (muon, adam))
    assert len(ours) == 4 * 2
    assert len(ours) + len(theirs) == len(list(made.parameters()))
    names = {id(p): n for n, p in made.named_parameters()}
    assert not [names[id(p)] for p in ours if "ada_lin" in names[id(p)] or p.dim() != 2]


def test_bad_input(tmp_path: Path) -> None:
    token_ids, condition = data()
    fitting = quantizer()

    def start(
        token_ids: Tensor = token_ids, quantizer: MultiScaleQuantizer = fitting, **options: int
    ) -> None:
        train_var(model(), quantizer, token_ids, condition, tmp_path, budget=Budget(steps=1), **options)

    with pytest.raises(InputError, match="images of 14 tokens"):
        start(token_ids[:, :9])
    with pytest.raises(InputError, match="knows 0 to 11"):
        start(token_ids + VOCAB_SIZE)
    with pytest.raises(InputError, match=r"the scales \[1, 2, 4\]"):
        start(quantizer=quantizer((1, 2, 4)))
    with pytest.raises(InputError, match="13 entries of width 4"):
        start(quantizer=quantizer(size=13))
    for wrong in (0, 3):
        with pytest.raises(InputError, match="from 1 to 2"):
            start(draft_scales=wrong)
        with pytest.raises(InputError, match="from 1 to 2"):
            refiner(model(), model(), wrong)
    with pytest.raises(InputError, match="do not fill a batch"):
        start()
    with pytest.raises(InputError, match="scales"):
        refiner(model(), model(scales=(1, 2, 4)))
    with pytest.raises(InputError, match="vocab_size"):
        refiner(model(), model(vocab_size=13))
    with pytest.raises(InputError, match="num_classes"):
        refiner(model(), model(num_classes=5))
    same = model()
    with pytest.raises(InputError, match="one model"):
        refiner(same, same)
    assert not list(tmp_path.iterdir()), "nothing was started"


# -- token ids of a multi-scale tokenizer -------------------------------------------------------------


def tokenizer(scales: tuple[int, ...] = (1, 2, 4)) -> MultiScaleVQModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiScaleVQModel(
            base_channels=8,
            channel_multipliers=(1, 1, 2, 2),
            num_res_blocks=1,
            codebook_size=32,
            codebook_dim=4,
            scales=scales,
            norm_groups=4,
        ).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_cache(folder, first_seed=0, count=6, size=32, shard_size=4, progress=False)
    return folder


def test_multiscale_token_ids_round_trip(scenes: Path, tmp_path: Path) -> None:
    vq = tokenizer()
    vq.save_pretrained(tmp_path / "vq")
    arguments = ["--tokenizer", str(tmp_path / "vq"), "--scenes", str(scenes), "--precision", "float32"]
    assert main([*arguments, "--out", str(tmp_path / "token-ids")]) == 0
    token_ids, _ = read_token_ids(tmp_path / "token-ids")
    manifest = read_manifest(tmp_path / "token-ids")
    assert (manifest.scales, manifest.grid, manifest.num_tokens) == ((1, 2, 4), (4, 4), 21)
    with torch.no_grad():
        encoding = vq.encode(to_images(CachedScenes(scenes).batch_pixels(range(6))))
        maps = vq.quantize.feature_maps(token_ids.long())
    assert torch.equal(token_ids.long(), encoding.indices)
    torch.testing.assert_close(maps[-1], encoding.quantized)
    assert main([*arguments, "--out", str(tmp_path / "token-ids")]) == 0, "it resumes"


def test_token_ids_of_other_scales_do_not_mix(scenes: Path, tmp_path: Path) -> None:
    encode_cache(tokenizer(), scenes, tmp_path, precision="float32", progress=False)
    with pytest.raises(CheckpointError, match="another scales"):
        encode_cache(tokenizer((1, 3, 4)), scenes, tmp_path, precision="float32", progress=False)
    np.save(token_ids_path(tmp_path, 0), np.zeros((4, 16), dtype=np.uint16))
    with pytest.raises(CheckpointError, match="does not match"):
        read_token_ids(tmp_path)


def test_manifests_without_scales_are_of_one_scale(tmp_path: Path) -> None:
    fields = {
        "tokenizer": "0" * 16,
        "codebook_size": 32,
        "grid": [8, 8],
        "precision": "float32",
        "world": "1",
        "first_seed": 0,
        "size": 32,
        "shard_size": 4,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    manifest = read_manifest(tmp_path)
    assert (manifest.scales, manifest.num_tokens) == ((), 64)


def test_the_class_of_a_tokenizer_is_in_its_config(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "many")
    VQModel(base_channels=8, channel_multipliers=(1, 1), norm_groups=4).save_pretrained(tmp_path / "one")
    model().save_pretrained(tmp_path / "none")
    assert isinstance(load_tokenizer(tmp_path / "many"), MultiScaleVQModel)
    assert isinstance(load_tokenizer(tmp_path / "one"), VQModel)
    with pytest.raises(InputError, match="VARTransformer, which is no image tokenizer"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "one" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not the config"):
        load_tokenizer(tmp_path / "one")
