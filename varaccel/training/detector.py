"""Training the scene detector on rendered images, degraded in the ways in which an image decoder errs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou
from tqdm import tqdm

from varaccel.errors import InputError
from varaccel.evaluation.metrics.adherence import judge, relation_holds
from varaccel.models.detector import Detection, DetectorOutput, SceneDetector
from varaccel.scenes.cache import CachedScenes
from varaccel.scenes.dataset import Sample, to_tensor
from varaccel.scenes.world import (
    COLORS,
    FLOORS,
    MATERIALS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    TIMES,
    Scene,
)
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, ExponentialAverage, Schedule, TrainingRun, model_settings

_KINDS = {"shape": SHAPES, "color": COLORS, "material": MATERIALS, "size": SIZES}


@dataclass(frozen=True)
class Degradation:
    """What is done to training images; the `_share`s say to how many of them.

    Attributes:
        jpeg_share, jpeg_quality: JPEG compression, quality drawn from the range.
        warp_share, warp: smooth displacement of up to about `warp` pixels (standard deviation).
        resample_share, resample: shrinking by a factor of the range and back (blur).
        noise_share, noise: Gaussian noise of up to this standard deviation, in units of [-1, 1], with grains of
            1, 2 or 4 pixels.
        contrast, brightness, tint: largest change of each; a tint this small makes no colour of the world look
            like another.
    """

    jpeg_share: float = 0.3
    jpeg_quality: tuple[int, int] = (10, 60)
    warp_share: float = 0.25
    warp: float = 1.2
    resample_share: float = 0.6
    resample: tuple[float, float] = (1.3, 3.2)
    noise_share: float = 0.3
    noise: float = 0.08
    contrast: float = 0.06
    brightness: float = 0.05
    tint: float = 0.02


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _warp(images: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Displace [n, 3, S, S] by a smooth random field with `strength` pixels of standard deviation."""
    count, _, size, _ = images.shape
    coarse = generator.normal(0, strength * 2 / size, (count, 2, size // 8, size // 8)).astype(np.float32)
    shift = F.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear").permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(count, -1, -1)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False) + shift  # [n, S, S, 2]
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def degrade(
    pixels: NDArray[np.uint8], generator: np.random.Generator, options: Degradation | None = None
) -> Tensor:
    """Images [B, S, S, 3] as an image tokenizer might return them: float32 [B, 3, S, S] around [-1, 1].

    A decoder of vector-quantised tokens blurs, wobbles edges, and errs in texture more than in colour; JPEG
    artefacts, warps, resampling and grain stand in for that, without tying the detector to one tokenizer.
    """
    options = options or Degradation()
    count, size = len(pixels), pixels.shape[1]

    def chosen(share: float) -> NDArray[np.intp]:
        return np.flatnonzero(generator.random(count) < share)

    pixels = pixels.copy()
    for index in chosen(options.jpeg_share):
        pixels[index] = _jpeg(pixels[index], int(generator.integers(*options.jpeg_quality, endpoint=True)))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
    warped = chosen(options.warp_share)
    if len(warped):
        images[warped] = _warp(images[warped], options.warp * float(generator.random()), generator)
    # one factor and filter per group of images, because resampling works on whole batches
    for group in np.array_split(generator.permutation(chosen(options.resample_share)), 4):
        if not len(group):
            continue
        side = max(1, round(size / float(generator.uniform(*options.resample))))
        small = F.interpolate(images[group], (side, side), mode=str(generator.choice(["area", "bilinear"])))
        back = str(generator.choice(["bilinear", "bicubic"]))
        images[group] = F.interpolate(small, (size, size), mode=back)
    for group, grain in zip(np.array_split(chosen(options.noise_share), 3), (1, 2, 4), strict=True):
        shape = (len(group), 3, size // grain, size // grain)
        level = generator.random((len(group), 1, 1, 1)) * options.noise
        speckle = torch.from_numpy((generator.standard_normal(shape, np.float32) * level).astype(np.float32))
        if len(group):
            images[group] += F.interpolate(speckle, (size, size), mode="nearest")
    gain = 1 + generator.uniform(-1, 1, (count, 1, 1, 1)) * options.contrast
    offset = generator.uniform(-1, 1, (count, 1, 1, 1)) * options.brightness
    offset = offset + generator.uniform(-1, 1, (count, 3, 1, 1)) * options.tint
    return images * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()


@dataclass(frozen=True)
class Truth:
    """Ground truth of B images with up to M = 3 objects each; rows beyond an image's objects are not `present`.

    Attributes:
        present: [B, M] bool.
        boxes: [B, M, 4] left, top, right, bottom as fractions of the image.
        depth: [B, M] world units.
        kinds: shape, color, material and size, each [B, M] int64 indices.
        floor, time_of_day: [B] int64 indices.
    """

    present: Tensor
    boxes: Tensor
    depth: Tensor
    kinds: dict[str, Tensor]
    floor: Tensor
    time_of_day: Tensor

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, indices: Tensor) -> Truth:
        return Truth(
            self.present[indices],
            self.boxes[indices],
            self.depth[indices],
            {name: values[indices] for name, values in self.kinds.items()},
            self.floor[indices],
            self.time_of_day[indices],
        )

    @classmethod
    def empty(cls, count: int) -> Truth:
        """Room for `count` images, none with an object."""

        def names(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64)

        return cls(
            torch.zeros(count, MAX_OBJECTS, dtype=torch.bool),
            torch.zeros(count, MAX_OBJECTS, 4),
            torch.zeros(count, MAX_OBJECTS),
            {kind: names(count, MAX_OBJECTS) for kind in _KINDS},
            names(count),
            names(count),
        )

    @classmethod
    def of_cache(cls, scenes: CachedScenes) -> Truth:
        """The ground truth of every image of a cache."""
        truth = cls.empty(len(scenes))
        for row in tqdm(
            range(len(scenes)), desc="reading ground truth", unit="image", leave=False, disable=None
        ):
            record = scenes.ground_truth(row)
            truth.floor[row] = FLOORS.index(record["floor"])
            truth.time_of_day[row] = TIMES.index(record["time_of_day"])
            for place, (solid, box) in enumerate(zip(record["objects"], record["boxes"], strict=True)):
                truth.present[row, place] = True
                truth.boxes[row, place] = torch.tensor(box)
                truth.depth[row, place] = solid["z"]
                for kind, options in _KINDS.items():
                    truth.kinds[kind][row, place] = options.index(solid[kind])
        return truth


def _assign(truth: Truth, grid: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Heat targets [B, G, G], 1 in the cell of each centre with a Gaussian of `spread` cells around it (CenterNet,
    equation 1), and the object [B, G, G] that each cell is nearest to."""
    centres = (truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2  # [B, M, 2]
    cells = (centres * grid).floor().clamp(0, grid - 1)
    steps = torch.arange(grid, dtype=torch.float32)
    columns = (steps - cells[..., 0, None]).square()  # [B, M, G]
    rows = (steps - cells[..., 1, None]).square()
    heat = torch.exp(-(rows[..., :, None] + columns[..., None, :]) / (2 * spread**2))  # [B, M, G, G]
    heat = heat * truth.present[..., None, None]
    best = heat.max(dim=1)
    return best.values, best.indices


def detector_loss(output: DetectorOutput, truth: Truth) -> dict[str, Tensor]:
    """Loss terms by name, to be summed.

    Heat: the focal loss of CenterNet (equation 1) per object. Edges and depth: L1. Attributes: cross-entropy in
    the cells at and beside a centre, weighted by their heat. Floor and time of day: cross-entropy.
    """
    grid = output.heat.shape[-1]
    target, owner = _assign(truth, grid)  # [B, G, G]
    objects = truth.present.sum().clamp(min=1)
    logits = output.heat.float().squeeze(1)
    chance = logits.sigmoid()
    centre = target == 1
    positive = (1 - chance).square() * F.logsigmoid(logits)
    negative = (1 - target) ** 4 * chance.square() * F.logsigmoid(-logits)
    terms = {"heat": -torch.where(centre, positive, negative).sum() / objects}

    batch, row, column = (target > 0.3).nonzero(as_tuple=True)  # [n] each
    chosen = owner[batch, row, column]
    weight = target[batch, row, column]
    weight = weight / weight.sum()
    boxes = truth.boxes[batch, chosen] * grid  # [n, 4]
    middle = torch.stack([column, row, column, row], dim=1) + 0.5
    edges = (boxes - middle) * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    seen = output.edges.float()[batch, :, row, column]
    terms["edges"] = (weight * (seen - edges).abs().mean(1)).sum()
    depth = output.depth.float()[batch, 0, row, column]
    terms["depth"] = 0.5 * (weight * (depth - truth.depth[batch, chosen]).abs()).sum()
    for kind, share in (("shape", 1.0), ("color", 1.0), ("material", 0.5), ("size", 0.5)):
        scores = getattr(output, kind).float()[batch, :, row, column]  # [n, K]
        loss = F.cross_entropy(scores, truth.kinds[kind][batch, chosen], reduction="none")
        terms[kind] = share * (weight * loss).sum()
    terms["floor"] = 0.3 * F.cross_entropy(output.floor.float(), truth.floor)
    terms["time_of_day"] = 0.2 * F.cross_entropy(output.time_of_day.float(), truth.time_of_day)
    return terms


@dataclass(frozen=True)
class DetectorRecipe:
    """Everything that decides what is learnt; a resumed run must have the same.

    Attributes:
        batch_size: images per optimiser step.
        lr, weight_decay: of AdamW; the peak of the schedule.
        warmup_steps, decay: see `Schedule`.
        ema_decay: of the averaged weights that are exported.
        grad_clip: largest gradient norm.
        degradation: what is done to the images.
        seed: of initialisation, sample order and degradation.
    """

    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    decay: float = 0.5
    ema_decay: float = 0.995
    grad_clip: float = 5.0
    degradation: Degradation = field(default_factory=Degradation)
    seed: int = 0


def new_detector(seed: int = 0, **config: object) -> SceneDetector:
    """An untrained detector whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SceneDetector(**config)


def train_detector(
    model: SceneDetector,
    scenes: CachedScenes,
    folder: Path,
    *,
    budget: Budget,
    recipe: DetectorRecipe | None = None,
) -> TrainingRun:
    """Train until the budget is spent, on the CPU, in bfloat16 if that is quick there; resumes a run found in `folder`.

    Args:
        model: ends with the averaged weights, in evaluation mode.
        scenes: training images of the model's `image_size`.

    Raises:
        InputError: the images have another size or do not fill a batch.
        CheckpointError: `folder` holds a different run.
    """
    recipe = recipe or DetectorRecipe()
    if scenes.size != model.config.image_size:
        raise InputError(
            f"the images are {scenes.size} pixels wide but the detector takes {model.config.image_size}; "
            "set its image_size."
        )
    if len(scenes) < recipe.batch_size:
        raise InputError(f"{len(scenes)} images do not fill a batch of {recipe.batch_size}.")
    truth = Truth.of_cache(scenes)
    model.to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.lr,
        fused=True,
    )
    schedule = Schedule(recipe.lr, recipe.warmup_steps, recipe.decay)
    ema = ExponentialAverage(model, recipe.ema_decay)
    config = model_settings(model.config)
    state: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimizer}
    run = TrainingRun(
        folder,
        budget,
        {"recipe": asdict(recipe), "model": config, "images": len(scenes)},
        state,
        save_every_minutes=1.0,
    )
    per_epoch = len(scenes) // recipe.batch_size
    model.train()
    bar = tqdm(
        total=100,
        desc="training detector",
        unit="%",
        bar_format="{l_bar}{bar}| {elapsed} {postfix}",
        disable=None,
    )
    for step in run.steps():
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((recipe.seed, 0, epoch)).permutation(len(scenes))
        rows = order[place * recipe.batch_size : (place + 1) * recipe.batch_size]
        generator = np.random.default_rng((recipe.seed, 1, step))
        images = degrade(scenes.batch_pixels(rows.tolist()), generator, recipe.degradation)
        with autocast(torch.device("cpu")):
            output = model(images)
        terms = detector_loss(output, truth[torch.from_numpy(rows)])
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, run.progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        if step % 20 == 0:
            run.log(
                loss=loss.detach(), grad_norm=norm, **{name: term.detach() for name, term in terms.items()}
            )
            bar.n = min(100, round(100 * run.progress))
            bar.set_postfix_str(f"step {step}, loss {float(loss.detach()):.3f}")
    ema.copy_to(model)
    bar.close()
    model.eval()
    return run


def _matches(seen: Sequence[Detection], sample: Sample) -> dict[int, Detection]:
    """Scene index to detection, greedily by score, at an intersection over union of at least 0.5."""
    if not seen:
        return {}
    overlap = box_iou(
        torch.tensor([one.box for one in seen]), torch.tensor(sample.rendering.boxes)
    )  # [detections, objects]
    matched: dict[int, Detection] = {}
    for place, one in enumerate(seen):
        value, index = (overlap[place].clone().index_fill_(0, torch.tensor(sorted(matched)).long(), -1)).max(
            0
        )
        if float(value) >= 0.5:
            matched[int(index)] = one
    return matched


def validate_detector(
    model: SceneDetector, samples: Sequence[Sample], images: Tensor | None = None
) -> dict[str, float]:
    """Quality of a detector on rendered scenes.

    Args:
        model: in evaluation mode.
        samples: scenes with their ground truth.
        images: [B, 3, S, S] images of the samples, for instance degraded; the renderings by default.

    Returns:
        Shares of 1, except `depth_error` (mean absolute, world units): `precision` and `recall` of objects at an
        intersection over union of 0.5; accuracy of `shape`, `color`, `shape_and_color`, `material`, `size` of
        matched objects; `relation`: stated relations seen to hold, over those whose objects are matched; `floor`
        and `time_of_day`; `adherence` of the images with their captions (the rate `correct`) and
        `adherence_alone` (no objects besides), `adherence_shuffled` with the captions of the next image.

    Raises:
        InputError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise InputError(f"validation needs at least two scenes, got {len(samples)}.")
    if images is None:
        images = torch.stack([to_tensor(sample.rendering.image) for sample in samples])
    captions = [sample.caption for sample in samples]
    observations = model.observe(images)
    verdicts = [judge(seen, text) for seen, text in zip(observations, captions, strict=True)]
    shuffled = [
        judge(seen, text) for seen, text in zip(observations, captions[1:] + captions[:1], strict=True)
    ]
    detected = objects = 0
    right: dict[str, list[float]] = {
        name: [] for name in (*_KINDS, "shape_and_color", "relation", "depth_error", "floor", "time_of_day")
    }
    for sample, seen in zip(samples, observations, strict=True):
        scene: Scene = sample.scene
        matched = _matches(seen.objects, sample)
        detected += len(seen.objects)
        objects += len(scene.objects)
        for index, one in matched.items():
            solid = scene.objects[index]
            for kind in _KINDS:
                right[kind].append(getattr(one, kind) == getattr(solid, kind))
            right["shape_and_color"].append((one.shape, one.color) == (solid.shape, solid.color))
            right["depth_error"].append(abs(one.depth - solid.z))
        right["relation"] += [
            relation_holds(statement.relation, matched[statement.subject], matched[statement.reference])
            for statement in sample.caption.statements
            if statement.subject in matched and statement.reference in matched
        ]
        right["floor"].append(seen.floor == scene.floor)
        right["time_of_day"].append(seen.time_of_day == scene.time_of_day)
    found = len(right["shape"])
    return {
        "precision": found / max(1, detected),
        "recall": found / objects,
        **{name: float(np.mean(values)) if values else float("nan") for name, values in right.items()},
        "adherence": float(np.mean([verdict.correct for verdict in verdicts])),
        "adherence_alone": float(np.mean([verdict.correct and verdict.alone for verdict in verdicts])),
        "adherence_shuffled": float(np.mean([verdict.correct for verdict in shuffled])),
    }
