"""Training of the word-level text encoder: reading captions, without images.

A host of the LlamaGen kind sees a caption as the average of its features, so this average has to hold what
the caption says: which colour goes with which shape, and who stands left of whom. The encoder is trained to
answer the questions of `varaccel.training.facts` from the masked mean of its features, through a linear head
and through a small MLP, and, for each word of a noun phrase, from the feature of the word.

Run `python -m varaccel.training.text --out FOLDER --minutes 10`; run it again to resume. The folder then
holds `tokenizer` and `text_encoder`, ready for `from_pretrained`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from varaccel.console import tolerant_console
from varaccel.files import atomic_path
from varaccel.scenes import HELD_OUT_SEED, VOCABULARY, WORLD_VERSION, caption, sample_scene
from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer
from varaccel.training.command_line import exit_status
from varaccel.training.facts import (
    CAPTION_FACTS,
    NO_ANSWER,
    WORD_FACTS,
    Looseness,
    StatedCaption,
    loosen,
    sample_caption,
    take_apart,
)
from varaccel.training.precision import autocast
from varaccel.training.run import Budget, Schedule, TrainingRun


@dataclass(frozen=True)
class TextRecipe:
    """How the text encoder is built and trained.

    Args:
        dim: feature channels.
        num_layers: transformer layers.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward layers.
        max_length: the longest caption in words, the end token included.
        batch_size: captions per step.
        peak: learning rate of AdamW at its height.
        warmup_steps: steps until that height.
        weight_decay: of the weight matrices.
        feature_noise: standard deviation of the noise on the averaged features, whose RMS is at most 1; it
            makes the encoder say everything clearly rather than just measurably.
        word_weight: weight of the questions to single words.
        looseness: how far captions depart from the grammar.
        seed: of weights and captions.
        bfloat16: run the matrix products in bfloat16, where that is quick.
    """

    dim: int = 256
    num_layers: int = 3
    num_heads: int = 4
    ffn_dim: int = 768
    max_length: int = 32
    batch_size: int = 128
    peak: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    feature_noise: float = 0.05
    word_weight: float = 0.5
    looseness: Looseness = field(default_factory=Looseness)
    seed: int = 0
    bfloat16: bool = True


class TextBatch(NamedTuple):
    """Captions as ids with their targets.

    Args:
        ids: `[B, T]` int64.
        mask: `[B, T]` bool, true at words and the end token.
        caption_targets: `[B, number of CAPTION_FACTS]` int64.
        word_targets: `[B, T, number of WORD_FACTS]` int64, `NO_ANSWER` where there is none.
    """

    ids: Tensor
    mask: Tensor
    caption_targets: Tensor
    word_targets: Tensor

    def to(self, device: torch.device) -> TextBatch:
        return TextBatch(*(tensor.to(device) for tensor in self))


def collate(captions: Sequence[StatedCaption], tokenizer: WordTokenizer) -> TextBatch:
    """Stack captions, padded on the right to the longest of them."""
    vocabulary = tokenizer.get_vocab()
    unknown, end, pad = tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [
        [unknown if word.text is None else vocabulary[word.text] for word in stated.words] + [end]
        for stated in captions
    ]
    length = max(map(len, rows))
    silent = [NO_ANSWER] * len(WORD_FACTS)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # [B, T]
    word_targets = [
        targets + [silent] * (length - len(targets))
        for targets in (stated.word_targets() for stated in captions)
    ]
    return TextBatch(
        ids,
        ids != pad,
        torch.tensor([stated.caption_targets() for stated in captions]),
        torch.tensor(word_targets),
    )


def caption_stream(recipe: TextRecipe, tokenizer: WordTokenizer, first_step: int = 0) -> Iterator[TextBatch]:
    """Endless training batches; batch `i` depends on the recipe's seed and on i alone."""
    step = first_step
    while True:
        generator = np.random.default_rng((recipe.seed, step))
        captions: list[StatedCaption] = []
        while len(captions) < recipe.batch_size:
            stated = loosen(take_apart(sample_caption(generator)), generator, recipe.looseness)
            if len(stated.words) < recipe.max_length:  # a cut caption would not say what it is asked for
                captions.append(stated)
        yield collate(captions, tokenizer)
        step += 1


class QuestionHead(nn.Module):
    """Logits of several multiple-choice questions from one vector.

    Args:
        dim: channels of the vector.
        questions: the possible answers of each question.
        hidden: width of a hidden layer; none if None.
    """

    closed: Tensor

    def __init__(self, dim: int, questions: Mapping[str, tuple[str, ...]], hidden: int | None = None) -> None:
        super().__init__()
        counts = [len(answers) for answers in questions.values()]
        self.shape = (len(counts), max(counts))
        size = self.shape[0] * self.shape[1]
        if hidden is None:
            self.project: nn.Module = nn.Linear(dim, size)
        else:
            self.project = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, size))
        # questions have different numbers of answers: the rest of a row is closed
        closed = torch.arange(self.shape[1]) >= torch.tensor(counts)[:, None]
        self.register_buffer("closed", closed, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """`[..., dim]` to logits `[..., questions, most answers]`, float32, -inf where there is no answer."""
        logits = self.project(vectors).float().unflatten(-1, self.shape)
        return logits.masked_fill(self.closed, -torch.inf)


_WHOLE = ("objects", "relation", "floor", "time of day")


class TextReader(nn.Module):
    """A text encoder with the heads that question it."""

    def __init__(self, encoder: WordTextEncoder) -> None:
        super().__init__()
        dim = encoder.config.dim
        self.encoder = encoder
        self.linear = QuestionHead(dim, CAPTION_FACTS)
        self.mlp = QuestionHead(dim, CAPTION_FACTS, hidden=2 * dim)
        self.word = QuestionHead(dim, WORD_FACTS)

    def features(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Word features `[B, T, C]` and their masked mean `[B, C]`."""
        words = self.encoder(ids, mask).last_hidden_state
        weights = mask / mask.sum(1, keepdim=True)  # [B, T]
        return words, torch.einsum("btc,bt->bc", words.float(), weights.float())

    def loss(self, batch: TextBatch, recipe: TextRecipe, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropies by head: `mlp`, `linear`, `word`, and `loss`, which is to be minimised."""
        words, mean = self.features(batch.ids, batch.mask)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        mean = mean + recipe.feature_noise * noise
        losses = {
            "mlp": _cross_entropy(self.mlp(mean), batch.caption_targets),
            "linear": _cross_entropy(self.linear(mean), batch.caption_targets),
            "word": _cross_entropy(self.word(words), batch.word_targets),
        }
        losses["loss"] = losses["mlp"] + losses["linear"] + recipe.word_weight * losses["word"]
        return losses


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_ANSWER)


@torch.no_grad()
def reading_accuracy(
    reader: TextReader, captions: Sequence[StatedCaption], tokenizer: WordTokenizer, batch_size: int = 256
) -> dict[str, float]:
    """How well captions are read.

    Returns:
        `mlp`, `linear`: share of correct answers of these heads among the questions whose answer is not
        "absent", so that empty slots do not flatter; `mlp captions`, `linear captions`: share of captions
        with every answer right; `word`: share of correct answers of single words; and `mlp <question>` for
        the kinds of question (shape, color, material, size, relation, floor, time of day, objects).
    """
    device = next(reader.parameters()).device
    was_training = reader.training
    reader.eval()
    right: dict[str, list[Tensor]] = {"mlp": [], "linear": [], "word": []}
    targets = []
    for start in range(0, len(captions), batch_size):
        batch = collate(captions[start : start + batch_size], tokenizer).to(device)
        words, mean = reader.features(batch.ids, batch.mask)
        right["mlp"].append(reader.mlp(mean).argmax(-1) == batch.caption_targets)
        right["linear"].append(reader.linear(mean).argmax(-1) == batch.caption_targets)
        asked = batch.word_targets != NO_ANSWER
        right["word"].append((reader.word(words).argmax(-1) == batch.word_targets)[asked])
        targets.append(batch.caption_targets)
    reader.train(was_training)

    correct = {head: torch.cat(parts) for head, parts in right.items()}
    absent = torch.tensor([answers[0] == "absent" for answers in CAPTION_FACTS.values()], device=device)
    present = ~((torch.cat(targets) == 0) & absent)  # [captions, questions]
    result = {"word": correct["word"].double().mean().item()}
    for head in ("mlp", "linear"):
        result[head] = correct[head][present].double().mean().item()
        result[f"{head} captions"] = correct[head].all(1).double().mean().item()
    kinds = [name if name in _WHOLE else name.rsplit(" ", 1)[1] for name in CAPTION_FACTS]
    for kind in dict.fromkeys(kinds):
        columns = torch.tensor([k == kind for k in kinds], device=device)
        result[f"mlp {kind}"] = correct["mlp"][:, columns][present[:, columns]].double().mean().item()
    return result


def held_out_captions(count: int, looseness: Looseness | None = None) -> list[StatedCaption]:
    """The captions of the first `count` scenes reserved for evaluation, as they are or in looser words."""
    result = []
    for seed in tqdm(
        range(HELD_OUT_SEED, HELD_OUT_SEED + count), desc="held-out captions", leave=False, disable=None
    ):
        parts = take_apart(caption(sample_scene(seed), seed))
        if looseness is None:
            result.append(parts.assemble())
        else:
            result.append(loosen(parts, np.random.default_rng((seed, 2)), looseness))
    return result


def train_text_encoder(
    folder: Path,
    budget: Budget,
    recipe: TextRecipe | None = None,
    device: torch.device | str = "cpu",
    log_every: int = 50,
) -> TextReader:
    """Train, or resume, and export.

    Args:
        folder: of the run; receives `tokenizer` and `text_encoder` at the end.
        budget: when to stop.
        recipe: how to build and train; must not change between resumes.
        device: where to train.
        log_every: steps between lines of the log.

    Returns:
        The trained encoder with its heads, in eval mode.

    Raises:
        CheckpointError: the folder holds a run of another recipe.
    """
    recipe = recipe or TextRecipe()
    device = torch.device(device)
    tokenizer, reader = build_reader(recipe)
    reader.to(device)
    matrices = [p for p in reader.parameters() if p.ndim > 1]
    vectors = [p for p in reader.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak,
        betas=(0.9, 0.98),
    )
    run = TrainingRun(
        folder,
        budget,
        {"recipe": asdict(recipe), "world": WORLD_VERSION},
        {"reader": reader, "optimizer": optimizer},
    )
    schedule = Schedule(recipe.peak, recipe.warmup_steps)
    batches = caption_stream(recipe, tokenizer, run.step)
    generator = torch.Generator(device)
    reader.train()
    with tqdm(
        total=100, desc="text encoder", unit="%", bar_format="{l_bar}{bar}| {elapsed} {postfix}", disable=None
    ) as bar:
        for step in run.steps():
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, run.progress)
            generator.manual_seed(recipe.seed + step)
            with autocast(device, recipe.bfloat16):
                losses = reader.loss(next(batches).to(device), recipe, generator)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            if step % log_every == 0:
                run.log(**{k: v.detach() for k, v in losses.items()}, rate=schedule(step, run.progress))
                bar.set_postfix_str(f"step {step}, loss {losses['loss'].item():.4f}")
            bar.update(min(100.0, 100 * run.progress) - bar.n)
    reader.eval()
    with atomic_path(run.folder / "tokenizer") as temporary:
        tokenizer.save_pretrained(temporary)
    with atomic_path(run.folder / "text_encoder") as temporary:
        reader.encoder.save_pretrained(temporary)
    return reader


def build_reader(recipe: TextRecipe) -> tuple[WordTokenizer, TextReader]:
    """The tokenizer of the world's captions and an untrained reader."""
    tokenizer = WordTokenizer.from_words(VOCABULARY, recipe.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the heads are drawn by torch's own initialisation
        encoder = WordTextEncoder(
            vocab_size=len(tokenizer),
            dim=recipe.dim,
            num_layers=recipe.num_layers,
            num_heads=recipe.num_heads,
            ffn_dim=recipe.ffn_dim,
            max_length=recipe.max_length,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer, TextReader(encoder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the trainer."""
    tolerant_console()
    parser = argparse.ArgumentParser(
        prog="python -m varaccel.training.text", description="Train the word-level text encoder."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, help="training time")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--evaluate", type=int, default=2000, help="held-out captions to read at the end")
    options = parser.parse_args(arguments)

    def train() -> None:
        budget = Budget(options.steps, options.minutes)
        reader = train_text_encoder(options.out, budget, device=options.device)
        tokenizer = WordTokenizer.from_pretrained(options.out / "tokenizer")
        for name, looseness in (("grammar", None), ("loose", Looseness(untouched=0.0))):
            scores = reading_accuracy(reader, held_out_captions(options.evaluate, looseness), tokenizer)
            print(name, {key: round(value, 5) for key, value in scores.items()})

    return exit_status(train)


if __name__ == "__main__":
    sys.exit(main())
