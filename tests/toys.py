"""Small causal hosts whose conditions are unlike LlamaGen's, each with all that accelerators need.

- `ModulatedHost`: adaptive norms by class and place, as in RAR, and positions added to the inputs.
- `PromptedHost`: prompts of token ids; the branches of guidance have prompts of different length, and position ids of
  two axes that count each row's own prompt.
- `LinedHost`: an end of line after every row, and tokens that are impossible at a position.

`BranchedPipeline` guides a `PromptedHost` with three branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny import eagle_head, redraw, vq_model
from varaccel.nn.attention_inputs import AttentionInputs, prefix_mask
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.prefix import PrefixConditioned
from varaccel.nn.signature import Signature
from varaccel.pipelines.base import Run
from varaccel.pipelines.causal import CausalPipeline

WIDTH, HEADS = 8, 2


class Block(nn.Module):
    """Attention through the slots of a cache, with an adaptive norm if there is modulation."""

    def __init__(self, modulated: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.scale_shift = nn.Linear(WIDTH, 2 * WIDTH) if modulated else None

    def forward(self, x: Tensor, attention: AttentionInputs, layer: int, vectors: Tensor | None) -> Tensor:
        seen = F.layer_norm(x, (WIDTH,))
        if self.scale_shift is not None:
            assert vectors is not None
            scale, shift = self.scale_shift(F.silu(vectors)).chunk(2, -1)
            seen = seen * (1 + scale) + shift
        q, k, v = self.qkv(seen).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, H, P, D] each
        if attention.cache is not None:
            assert attention.slots is not None
            k, v = attention.cache.update(layer, attention.slots, k, v, attention.length)
        mixed = F.scaled_dot_product_attention(q, k, v, attention.mask, is_causal=attention.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(F.layer_norm(x, (WIDTH,)))


class Host(ModelMixin, ConfigMixin, PrefixConditioned):
    """What the three have in common: layers, a cache, a head."""

    def _build(self, vocab_size: int, layers: int, modulated: bool = False) -> None:
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block(modulated) for _ in range(layers))
        self.head = nn.Linear(WIDTH, vocab_size)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tokens(tokens)

    def told(self, x: Tensor, attention: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """Inputs with what is added to them, and the vectors of adaptive norms."""
        return x, None

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        x, vectors = self.told(x, attention)
        for index, number in enumerate(range(self.num_layers) if layers is None else layers):
            x = self.blocks[number](x, attention, index, vectors)
        return F.layer_norm(x, (WIDTH,))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features).float()

    def new_cache(self, rows: int, slots: int, layers: Sequence[int] | None = None) -> KVCache:
        count = self.num_layers if layers is None else len(layers)
        sizes = {"layers": count, "batch": rows, "heads": HEADS, "slots": slots, "head_dim": WIDTH // HEADS}
        return KVCache(**sizes, dtype=self.dtype, device=self.device)


class ModulatedHost(Host):
    """Class-conditional; every place has adaptive norms of its own, and positions are part of the inputs."""

    @register_to_config
    def __init__(self, vocab_size: int = 3, side: int = 3, num_classes: int = 3, layers: int = 2) -> None:
        super().__init__()
        self._build(vocab_size, layers, modulated=True)
        self.classes = nn.Embedding(num_classes + 1, WIDTH)
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Embedding(2 + side * side, WIDTH)
        self.cells = nn.Embedding(side * side, WIDTH)

    def signature(self) -> Signature:
        c = self.config
        return Signature("class", c.num_classes, vocab_size=c.vocab_size, layout=(c.side,), condition_slots=2)

    def embed_condition(self, values: Tensor) -> Tensor:
        classes = self.classes(values).unsqueeze(1)
        return torch.cat([self.first.expand(len(values), -1, -1), classes], 1)  # [R, 2, D]

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
        return torch.arange(prefix + sum(grid.num_positions for grid in grids)).unsqueeze(0)

    def modulation(self, values: Tensor, prefix: int, grids: Sequence[Grid]) -> Tensor:
        return self.classes(values).unsqueeze(1)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tokens(tokens) + self.cells(positions.clamp(min=0))

    def told(self, x: Tensor, attention: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        assert attention.modulation is not None
        return x, attention.modulation + self.places(attention.positional)


class PromptedHost(Host):
    """Conditioned on prompts of token ids, read by the same layers as the image; two axes of position ids."""

    @register_to_config
    def __init__(self, vocab_size: int = 3, side: int = 3, prompt_vocab: int = 6, layers: int = 2) -> None:
        super().__init__()
        self._build(vocab_size, layers)
        self.words = nn.Embedding(prompt_vocab, WIDTH)
        self.along, self.rows = nn.Embedding(32, WIDTH), nn.Embedding(1 + side, WIDTH)

    def signature(self) -> Signature:
        c = self.config
        return Signature("prompt", c.prompt_vocab, vocab_size=c.vocab_size, layout=(c.side,))

    def embed_condition(self, values: Tensor) -> Tensor:
        return self.words(values)

    def unconditional(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
        assert mask is not None
        (grid,) = grids
        read = mask.long().cumsum(1)  # [R, T]
        image = torch.arange(grid.num_positions)
        along = torch.cat([(read - 1).clamp(min=0), read[:, -1:] + image], 1)
        row = torch.cat([torch.zeros(prefix, dtype=torch.int64), 1 + image // grid.width]).expand_as(along)
        return torch.stack([along, row], -1)  # [R, T + N, 2]

    def told(self, x: Tensor, attention: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        along, row = attention.positional.unbind(-1)
        return x + self.along(along) + self.rows(row), None


class LinedHost(Host):
    """Class-conditional; the last id ends a line, and the first row never holds the last but one."""

    @register_to_config
    def __init__(
        self, vocab_size: int = 4, height: int = 2, width: int = 2, num_classes: int = 3, layers: int = 2
    ) -> None:
        super().__init__()
        self._build(vocab_size, layers)
        self.classes = nn.Embedding(num_classes + 1, WIDTH)
        self.places = nn.Embedding(1 + height * (width + 1), WIDTH)

    def signature(self) -> Signature:
        c = self.config
        return Signature("class", c.num_classes, vocab_size=c.vocab_size, layout=(c.height, c.width))

    def embed_condition(self, values: Tensor) -> Tensor:
        return self.classes(values).unsqueeze(1)

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
        return torch.arange(prefix + sum(grid.num_positions for grid in grids)).unsqueeze(0)

    def told(self, x: Tensor, attention: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        return x + self.places(attention.positional), None

    def possible_tokens(self, positions: Tensor, grids: Sequence[Grid]) -> Tensor | None:
        possible = super().possible_tokens(positions, grids)
        assert possible is not None
        first_row = (positions < self.config.width).unsqueeze(-1)
        return possible & ~(first_row & (torch.arange(self.config.vocab_size) == self.config.vocab_size - 2))


class ModulatedPipeline(CausalPipeline):
    family: ClassVar[str] = "modulated"


def padded(prompts: Sequence[str | int]) -> Condition:
    """Digits as token ids, left-padded."""
    ids = [[int(digit) for digit in str(prompt)] for prompt in prompts]
    length = max(map(len, ids))
    values = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    return Condition(values, torch.arange(length) >= length - torch.tensor([[len(row)] for row in ids]))


class PromptedPipeline(CausalPipeline):
    """Prompts are digits; the negative prompt is two words long, whatever the prompt is."""

    family: ClassVar[str] = "prompted"

    def _condition(self, prompts: list[str | int]) -> Condition:
        return replace(padded(prompts), negative=padded(["54"] * len(prompts)))


class BranchedPipeline(CausalPipeline):
    """Prompts are "words/picture": the branches read both, the picture alone, and two words of no meaning."""

    family: ClassVar[str] = "branched"

    def _condition(self, prompts: list[str | int]) -> Condition:
        words, pictures = zip(*(str(prompt).split("/") for prompt in prompts), strict=True)
        both = padded([picture + word for word, picture in zip(words, pictures, strict=True)])
        return replace(both, negative=(padded(pictures), padded(["54"] * len(prompts))))


class LinedPipeline(CausalPipeline):
    family: ClassVar[str] = "lined"

    def _grids(self, run: Run) -> tuple[Grid, ...]:
        c = self.transformer.config
        return (Grid(c.height, c.width, end_of_line=c.vocab_size - 1),)

    def _latents(self, run: Run) -> Tensor:
        return run.canvas.tokens


HOSTS: dict[str, tuple[type[Host], type[CausalPipeline]]] = {
    "modulated": (ModulatedHost, ModulatedPipeline),
    "prompted": (PromptedHost, PromptedPipeline),
    "lined": (LinedHost, LinedPipeline),
}
WITH_BRANCHES = {**HOSTS, "branched": (PromptedHost, BranchedPipeline)}
SCALES = (3.0, 1.5)
"""Of the words and of the picture of a `BranchedPipeline`."""
PROMPTS: dict[str, list[int | str]] = {
    "modulated": [1, 0, 2],
    "prompted": ["3", "1412", "22"],
    "lined": [2, 0, 1],
    "branched": ["3/25", "1412/0", "2/301"],
}
"""Three prompts of each host; those of the prompted one, and all branches, have different lengths."""


def host(name: str, seed: int = 0, layers: int = 2) -> Host:
    """A random network whose distributions are neither flat nor certain."""
    network = WITH_BRANCHES[name][0](layers=layers)
    redraw(network, seed, std=0.6)
    return network.eval()


@cache
def toy_pipeline(name: str) -> CausalPipeline:
    """A pipeline with an untrained EAGLE head, and a smaller drafter, a disturbed copy so that some of its tokens hold;
    shared by tests."""
    network, small = host(name), host(name, seed=1, layers=1)
    theirs = dict(network.named_parameters())
    with torch.no_grad():
        for key, parameter in small.named_parameters():
            parameter.mul_(0.2).add_(theirs[key])
    pipe = WITH_BRANCHES[name][1](
        network,
        vq_model(codebook_size=network.config.vocab_size),
        guidance_scale=SCALES if name == "branched" else 2.0,
        eagle_head=eagle_head(network),
        draft_transformer=small,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def toy_logits(
    name: str, prompt: int | str, guidance: float | tuple[float, ...], interval: int = -1
) -> Callable[[Tensor], Tensor]:
    """Teacher-forced guided logits of whole images [n, N] -> [n, N, V], from full passes without a cache.

    Each branch is read alone and unpadded; the session reads all at once, padded to the longest. They are summed with
    the weights that the scales of successive differences come to.
    """
    pipe = toy_pipeline(name)
    network = pipe.transformer
    condition = pipe._condition([prompt])
    assert condition is not None
    grids = pipe._grids(None)  # type: ignore[arg-type]
    negatives = condition.negatives or (Condition(network.unconditional(condition.values), condition.mask),)
    scales = guidance if isinstance(guidance, tuple) else (guidance,)
    weights = [upper - lower for upper, lower in zip((*scales, 1.0), (0.0, *scales), strict=True)]

    def branch(given: Condition, tokens: Tensor) -> Tensor:
        prefix = network.encode_condition(Condition(given.values, given.mask), grids, guided=False)
        positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
        inputs = network.embed_tokens(tokens[:, :-1], positions)
        x = torch.cat([prefix.embeddings.expand(len(tokens), -1, -1), inputs], 1)
        used = torch.ones(1, prefix.length) if prefix.mask is None else prefix.mask
        places = None if prefix.positional is None else prefix.positional[:, : x.shape[1]]
        attention = AttentionInputs(places, prefix.modulation, mask=prefix_mask(used, x.shape[1]))
        return network.logits(network.transform(x, attention))[:, prefix.length - 1 :]

    def logits(tokens: Tensor) -> Tensor:
        parts = [branch(given, tokens) for given in (condition, *negatives)]
        told = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        assert isinstance(told, Tensor)
        if interval >= 0:
            told[:, interval + 2 :] = parts[0][:, interval + 2 :]
        possible = network.possible_tokens(torch.arange(tokens.shape[1]), grids)
        return told if possible is None else told.masked_fill(~possible, -torch.inf)

    return logits
