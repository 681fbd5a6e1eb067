"""A causal host whose images of any length have a distribution that is known without it: a Markov chain on a grid.

Each token depends on the column and on the last `WIDTH` tokens, through one weight matrix and factors of the condition.
So probabilities of tokens, of neighbours and of pairs at any distance follow from the matrix by transfer over the
states of these tokens. The network finds the tokens by attention in its cache, as all networks do: with keys that say
the slot and queries that ask for one, so sharp that exactly one slot answers. What is read from a wrong slot, or
hidden, changes the distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from tests.innovations import Drawn, chance
from tests.tiny import vq_model
from tests.toys import Host
from varaccel.hosts.causal.guidance import Guidance
from varaccel.hosts.causal.sampling import Sampling
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.signature import Signature
from varaccel.pipelines.causal import CausalPipeline

VOCAB_SIZE, WIDTH, HEIGHT = 5, 4, 50
POSITIONS = WIDTH * HEIGHT
NEIGHBOURS = {"left": 1, "above": WIDTH}
LOOKS_BACK = (
    WIDTH - 1,
    1,
    WIDTH - 2,
)  # slots from the token before: above, two to the left, above on the right
BITS = 9  # of the number of a slot
FEATURES = VOCAB_SIZE * (1 + len(LOOKS_BACK)) + WIDTH
NONE = VOCAB_SIZE  # what stands before the first token


def features(tokens: Tensor, column: Tensor) -> Tensor:
    """[..., FEATURES] of the last `WIDTH` tokens [..., WIDTH] (or `NONE`), oldest first, and the column [...]."""
    newest_first = tokens.flip(-1)
    ordered = newest_first[..., [0, *LOOKS_BACK]]
    shown = F.one_hot(ordered, VOCAB_SIZE + 1)[..., :VOCAB_SIZE].flatten(-2)
    return torch.cat([shown, F.one_hot(column, WIDTH)], -1).float()


class MarkovHost(Host):
    """One layer per token that is looked up, so that a drafter may leave layers out."""

    @register_to_config
    def __init__(self, num_classes: int = 2, seed: int = 0, disturbance: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(FEATURES, VOCAB_SIZE, generator=generator)
        noise = torch.randn(FEATURES, VOCAB_SIZE, generator=generator)
        self.weights = nn.Parameter(weights + disturbance * noise)
        factors = 0.5 + torch.rand(num_classes + 1, FEATURES, generator=generator)
        self.factors = nn.Embedding.from_pretrained(factors)
        codes = (torch.arange(2**BITS).unsqueeze(1) >> torch.arange(BITS)) % 2 * 2.0 - 1
        self.register_buffer("codes", codes, persistent=False)

    @property
    def num_layers(self) -> int:
        return len(LOOKS_BACK)

    def signature(self) -> Signature:
        return Signature("class", self.config.num_classes, vocab_size=VOCAB_SIZE, layout=(HEIGHT, WIDTH))

    def embed_condition(self, values: Tensor) -> Tensor:
        return torch.zeros(len(values), 1, FEATURES)

    def positional(self, prefix: int, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
        return torch.arange(prefix + POSITIONS).unsqueeze(0)

    def modulation(self, values: Tensor, prefix: int, grids: Sequence[Grid]) -> Tensor:
        return self.factors(values).unsqueeze(1)

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert tokens.max() < VOCAB_SIZE, "no token of the vocabulary was drawn"
        return F.pad(F.one_hot(tokens, VOCAB_SIZE).float(), (0, FEATURES - VOCAB_SIZE))

    def transform(self, x: Tensor, attention: AttentionInputs, layers: Sequence[int] | None = None) -> Tensor:
        slots, cache = attention.positional, attention.cache
        assert slots is not None
        assert cache is not None
        assert attention.slots is not None
        assert attention.modulation is not None
        left = x[..., :VOCAB_SIZE]
        rows = left.shape[0]
        found = [torch.zeros_like(left) for _ in LOOKS_BACK]
        keys = self.codes[slots].expand(rows, -1, -1).unsqueeze(1)
        values = F.pad(left, (0, BITS - VOCAB_SIZE)).unsqueeze(1)
        for index, layer in enumerate(range(self.num_layers) if layers is None else layers):
            asked = (slots - LOOKS_BACK[layer]).clamp(min=0)  # what stands before the first is the condition
            query = 200 * self.codes[asked].expand(rows, -1, -1).unsqueeze(1)
            k, v = cache.update(index, attention.slots, keys, values, attention.length)
            answer = F.scaled_dot_product_attention(query, k, v, attention.mask, is_causal=attention.causal)
            found[layer] = answer[:, 0, :, :VOCAB_SIZE]
        column = F.one_hot(slots % WIDTH, WIDTH).float().expand(rows, -1, -1)  # of what is predicted
        return torch.cat([left, *found, column], -1) * attention.modulation

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weights

    def new_cache(self, rows: int, slots: int, layers: Sequence[int] | None = None) -> KVCache:
        count = self.num_layers if layers is None else len(layers)
        sizes = {"layers": count, "batch": rows, "heads": 1, "slots": slots, "head_dim": BITS}
        return KVCache(**sizes, dtype=torch.float32, device=torch.device("cpu"))


class MarkovPipeline(CausalPipeline):
    family: ClassVar[str] = "markov"


@cache
def markov_pipeline() -> MarkovPipeline:
    """With a smaller model of disturbed weights to draft with; shared by tests."""
    pipe = MarkovPipeline(
        MarkovHost().eval(),
        vq_model(codebook_size=VOCAB_SIZE),
        guidance_scale=2.0,
        draft_transformer=MarkovHost(disturbance=0.5).eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Chain:
    """The distribution of the images of a call, by transfer over the last `WIDTH` tokens.

    Args:
        network: the host or a drafter.
        label, guidance, sampling: of the call.
    """

    def __init__(self, network: MarkovHost, label: int, guidance: Guidance, sampling: Sampling) -> None:
        states = torch.cartesian_prod(*[torch.arange(VOCAB_SIZE + 1)] * WIDTH)  # [S, WIDTH]
        tables = []
        with torch.inference_mode():
            factors = network.factors.weight
            for column in range(WIDTH):
                seen = features(states, torch.full(states.shape[:1], column))
                logits = (seen * factors[label]) @ network.weights
                if guidance.enabled:
                    logits = guidance.combine(logits, (seen * factors[-1]) @ network.weights)
                tables.append(sampling.filter(logits).double().softmax(-1))
        self.tables = torch.stack(tables).clone()  # [WIDTH, S, V]
        self._weights = (VOCAB_SIZE + 1) ** torch.arange(WIDTH - 1, -1, -1)

    def probs(self, tokens: Tensor) -> Tensor:
        """[B, N, V] of every token of images [B, N], given those before it."""
        padded = F.pad(tokens, (WIDTH, 0), value=NONE)
        states = (padded.unfold(1, WIDTH, 1)[:, :-1] * self._weights).sum(-1)  # [B, N]
        return self.tables[torch.arange(tokens.shape[1]) % WIDTH, states]

    @cache  # noqa: B019 (chains live as long as the tests)
    def state(self, position: int) -> Tensor:
        """[S] distribution of the tokens before a position."""
        if position == 0:
            start = torch.zeros(self.tables.shape[1], dtype=torch.float64)
            start[-1] = 1
            return start
        return self._step(self.state(position - 1).unsqueeze(0), position - 1)[0]

    def _step(self, states: Tensor, position: int) -> Tensor:
        """Distributions [R, S] of states before a position -> [R, S] before the next."""
        joint = states.unsqueeze(2) * self.tables[position % WIDTH]  # [R, S, V]
        moved = joint.view(len(states), VOCAB_SIZE + 1, -1, VOCAB_SIZE).sum(
            1
        )  # the oldest token is forgotten
        return F.pad(moved, (0, 1)).flatten(1)

    @cache  # noqa: B019
    def pair(self, first: int, second: int) -> Tensor:
        """[V, V] joint distribution of the tokens at two positions."""
        joint = self.state(first).unsqueeze(1) * self.tables[first % WIDTH]  # [S, V]
        rows = []
        for token in range(VOCAB_SIZE):
            moved = torch.zeros(1, *joint.shape, dtype=torch.float64)
            moved[0, :, token] = joint[:, token]
            states = F.pad(moved.view(1, VOCAB_SIZE + 1, -1, VOCAB_SIZE).sum(1), (0, 1)).flatten(1)
            for position in range(first + 1, second):
                states = self._step(states, position)
            rows.append((states @ self.tables[second % WIDTH])[0])
        return torch.stack(rows)

    def single(self, position: int) -> Tensor:
        """[V] distribution of the token at a position."""
        return self.state(position) @ self.tables[position % WIDTH]

    def drawn(self, out: Any) -> Drawn:
        """The images of a call as `innovations` looks at them."""
        tokens = out.images.flatten(1)
        return Drawn(tokens, self.probs(tokens), out.written.flatten(1).long())

    def p_values(self, tokens: Tensor) -> dict[str, float]:
        """Chi-squares of images [B, N]: single tokens, neighbours and far pairs, here and there in the image."""
        last = POSITIONS - 1
        scores = {}
        for position in (0, WIDTH, POSITIONS // 2, last):
            scores[f"token {position}"] = _pearson(tokens[:, position], self.single(position))
        for first in (1, POSITIONS // 2 + 2, last - WIDTH):
            for second in (first + 1, first + WIDTH, (first + POSITIONS // 2) % POSITIONS):
                a, b = sorted((first, second))
                scores[f"tokens {a} and {b}"] = _pearson(
                    tokens[:, a] * VOCAB_SIZE + tokens[:, b], self.pair(a, b).flatten()
                )
        return scores


def _pearson(found: Tensor, probs: Tensor) -> float:
    """The probability of Pearson's statistic of drawn numbers [B]; rare ones are pooled until none is rare."""
    observed = torch.bincount(found, minlength=len(probs)).double()
    assert observed[probs == 0].sum() == 0, "what is impossible was drawn"
    expected, order = (probs * len(found)).sort()
    # the least likely ones that are five together, then each of the others
    pooled = int((expected.cumsum(0) < 5).sum()) + 1
    parts = [pooled, *[1] * (len(probs) - pooled)]
    observed, expected = (
        torch.stack([part.sum() for part in numbers.split(parts)]) for numbers in (observed[order], expected)
    )
    return chance(float(((observed - expected) ** 2 / expected).sum()), len(parts) - 1)
