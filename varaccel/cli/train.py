"""`varaccel train ...`: training what belongs to a finished pipeline."""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varaccel.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from varaccel.models.eagle import EagleHead
    from varaccel.training.feature_pairs import Conditions

train_app = typer.Typer(help="Train helpers of a finished pipeline.", no_args_is_help=True)


@train_app.callback()
def train() -> None:
    """Train helpers of a finished pipeline."""


TokenIdsFolder = Annotated[
    Path, typer.Option(help="Folder of token ids, from `python -m varaccel.training.token_ids`.")
]
ScenesFolder = Annotated[Path | None, typer.Option(help="Folder of the encoded images, for their captions.")]
LabelsFile = Annotated[
    Path | None, typer.Option(help="Class labels of the images (.npy), for class-conditional targets.")
]
RunFolder = Annotated[Path, typer.Option(help="Folder of the run; the drafter is written to OUT/export.")]
TrainGuidance = Annotated[
    float | None,
    typer.Option(
        help="Train on the distributions of this guidance; 1 = on unguided ones.",
        show_default="the target's own",
    ),
]
TrainTemperature = Annotated[
    float | None, typer.Option(help="Temperature of the distributions.", show_default="the target's own")
]
DistributionWeight = Annotated[float, typer.Option(help="Weight of the cross-entropy of distributions.")]
InstallFolder = Annotated[Path | None, typer.Option(help="Also write the drafter here, in half precision.")]


@train_app.command()
def drafter(
    token_ids: TokenIdsFolder,
    target: Annotated[str, typer.Option(help="The pipeline to draft for.")] = "mini-llamagen",
    scenes: ScenesFolder = None,
    labels: LabelsFile = None,
    out: RunFolder = Path("runs/drafter"),
    minutes: Annotated[float | None, typer.Option(help="Training time.", show_default="20")] = None,
    until: Annotated[
        float | None, typer.Option(help="Train until this time instead, in seconds since the epoch.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of or beside a time.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per optimiser step.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Compute a batch in this many parts, to save memory.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    distribution_weight: DistributionWeight = 0.1,
    guidance_scale: TrainGuidance = None,
    temperature: TrainTemperature = None,
    noise: Annotated[float, typer.Option(help="Half-width of noise on the features that are read.")] = 0.0,
    unroll: Annotated[
        int, typer.Option(help="Drafts in a row that are trained; 2 makes later ones better.")
    ] = 1,
    validation: Annotated[int, typer.Option(help="Images that are held out.")] = 256,
    seed: Annotated[int, typer.Option(help="Of weights, sample order and noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="Compile both networks first.")] = False,
    install: InstallFolder = None,
) -> None:
    """Train an EAGLE drafter for speculative decoding of a causal pipeline. Run it again to resume."""
    import torch

    from varaccel.files import check_writable_folder
    from varaccel.pipelines.auto import AutoPipeline
    from varaccel.training.drafter import DrafterRecipe, train_drafter
    from varaccel.training.feature_pairs import new_head
    from varaccel.training.run import Budget

    if batch_size < 1 or accumulate < 1 or validation < 0:
        raise InputError("batch_size and accumulate must be at least 1, validation at least 0.")
    check_writable_folder(out / "export")
    check_writable_folder(install)
    pipe: Any = AutoPipeline.from_pretrained(target, dtype=torch.float32)
    recipe = DrafterRecipe(
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        distribution_weight=distribution_weight,
        guidance_scale=pipe.config.guidance_scale if guidance_scale is None else guidance_scale,
        temperature=pipe.config.temperature if temperature is None else temperature,
        noise=noise,
        unroll=unroll,
        seed=seed,
    )
    tokens, made_by = _own_tokens(pipe, token_ids, target)
    pipe.to(device)
    tokens, condition = _conditions(pipe, tokens, scenes, labels, device)
    torch.manual_seed(seed)
    head = new_head(pipe.transformer, tokens, condition)
    run = train_drafter(
        head,
        pipe.transformer,
        tokens,
        condition,
        out,
        budget=Budget(steps, 20.0 if (steps, minutes, until) == (None, None, None) else minutes, until),
        recipe=recipe,
        validation=validation,
        compile=compile,
        settings={"image_tokenizer": made_by, "images": len(tokens)},
    )
    _write_and_tell(run, head, out, install)


def _own_tokens(pipe: Any, token_ids: Path, target: str) -> tuple[Tensor, str]:
    """The token ids in a folder, and the fingerprint of the image tokenizer that made them.

    Raises:
        InputError: that was another tokenizer than the pipeline's.
    """
    from varaccel.training.shards import fingerprint
    from varaccel.training.token_ids import read_token_ids

    tokens, made_by = read_token_ids(token_ids)
    own = fingerprint(pipe.vq_model)
    if made_by != own:
        raise InputError(
            f"the token ids in {token_ids} were made by another image tokenizer ({made_by}) than that of {target} "
            f"({own}); encode the images with the target's vq_model."
        )
    return tokens, own


def _write_and_tell(run: Any, head: EagleHead, out: Path, install: Path | None) -> None:
    """Write the drafter and the plot of its training, and print what was measured last."""
    from varaccel.training.drafter import MEASURED_DEPTH

    save_drafter(head, out / "export")
    with contextlib.suppress(ImportError):  # matplotlib comes with the `train` extra only
        run.plot(["loss", *(f"validation_acceptance_{depth}" for depth in range(1, MEASURED_DEPTH + 1))])
    typer.echo(f"{out / 'export'}: {run.step} steps in {run.seconds / 60:.1f} min")
    if install is not None:
        save_drafter(copy.deepcopy(head).half(), install)
        typer.echo(f"{install}: the same in half precision")
    names = [f"ema_validation_acceptance_{depth}" for depth in range(1, MEASURED_DEPTH + 1)]
    measured = [row for row in run.history() if names[0] in row]
    if measured:
        chances = [f"{measured[-1][name]:.3f}" for name in names]
        typer.echo(f"chance that draft token 1, 2, 3 in a row is accepted: {', '.join(chances)}")


def _conditions(
    pipe: Any, token_ids: Tensor, scenes: Path | None, labels: Path | None, device: str
) -> tuple[Tensor, Conditions]:
    """The token ids that have a condition, and their conditions."""
    import torch

    from varaccel.scenes.cache import CachedScenes
    from varaccel.training.conditions import caption_condition, label_condition, prompt_condition

    signature = pipe.transformer.signature()
    if signature.condition != "class":
        if scenes is None:
            raise InputError("a text-conditional target needs the captions of the images: pass --scenes.")
        captions = CachedScenes(scenes, allow_partial=True).captions
        count = min(len(token_ids), len(captions))
        if getattr(pipe, "text_encoder", None) is None:  # the network reads the words itself
            return token_ids[:count], prompt_condition(captions[:count], pipe, device)
        pipe.text_encoder.to(device)
        length = signature.condition_slots or pipe.text_encoder.config.max_length
        condition = caption_condition(captions[:count], pipe.tokenizer, pipe.text_encoder, length, device)
        return token_ids[:count], condition
    if labels is None:
        raise InputError("a class-conditional target needs the labels of the images: pass --labels.")
    numbers = torch.from_numpy(_read_array(labels))
    if len(numbers) < len(token_ids):
        raise InputError(
            f"{labels} holds {len(numbers)} labels for {len(token_ids)} images; one for each is needed."
        )
    return token_ids, label_condition(numbers[: len(token_ids)], signature.condition_size, device)


def _read_array(path: Path) -> Any:
    import numpy as np

    try:
        array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a numpy array ({error}).") from error
    # unsigned types of more than 8 bits exist in numpy but hardly in torch
    return array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array


def save_drafter(head: EagleHead, folder: Path) -> None:
    """Write a drafter whole or not at all; other files of `folder`, such as a model card, stay.

    Raises:
        CheckpointError: nothing could be written.
    """
    from varaccel.files import atomic_path

    try:
        with atomic_path(folder) as temporary:
            head.save_pretrained(temporary)
            for entry in folder.iterdir() if folder.is_dir() else ():
                if not (temporary / entry.name).exists():
                    copied = temporary / entry.name
                    shutil.copytree(entry, copied) if entry.is_dir() else shutil.copy2(entry, copied)
    except OSError as error:
        raise CheckpointError(f"the drafter could not be written to {folder}: {error}") from error
