"""Prompts to caption features: T5 as the published models use it, and a small word-level encoder.

A text-conditioned host reads `TextFeatures`: T caption positions per prompt, left-padded. `encode_prompts`
makes them from any pair of tokenizer and text encoder, so that both can be plain components of a pipeline:
a T5 tokenizer with `T5EncoderModel`, or `WordTokenizer` with `WordTextEncoder`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from varaccel.errors import InputError
from varaccel.nn.number_check import check_finite
from varaccel.tokenizers.captions import clean_prompt, what_is_cleaned

logger = logging.getLogger(__name__)

# fast tokenizers keep padding and truncation as state, which the call of another thread would change half-way
_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class TextFeatures:
    """Caption features of a batch of prompts.

    Args:
        features: `[B, T, C]` floating point; the n valid vectors of a row stand last, in reading order, and
            the T - n positions before them are exactly zero.
        mask: `[B, T]` bool, true where a position is valid.
    """

    features: Tensor
    mask: Tensor

    @classmethod
    def from_hidden_states(cls, hidden_states: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Left-pad the output of a text encoder.

        Args:
            hidden_states: `[B, T, C]`; whatever stands at padded positions is dropped, NaN included.
            attention_mask: `[B, T]` bool or 0/1, wherever its padding stands.
        """
        valid = attention_mask.bool()
        # a stable sort of the mask moves padding to the front and keeps the order of the valid positions
        order = valid.long().argsort(dim=1, stable=True)  # [B, T]
        mask = valid.gather(1, order)
        features = hidden_states.gather(1, order[..., None].expand_as(hidden_states))
        return cls(features.masked_fill(~mask[..., None], 0.0), mask)

    @property
    def lengths(self) -> Tensor:
        """`[B]` int64, the number of valid positions of each prompt."""
        return self.mask.sum(1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """The same features elsewhere or in another floating-point type."""
        return TextFeatures(self.features.to(device=device, dtype=dtype), self.mask.to(device=device))


class TextEncoder(Protocol):
    """What `encode_prompts` asks of a text encoder; `transformers.T5EncoderModel` has it."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return an object whose `last_hidden_state` is `[B, T, C]`."""


@torch.no_grad()
def encode_prompts(
    tokenizer: Any,
    text_encoder: TextEncoder,
    prompts: str | Sequence[str],
    *,
    max_length: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    clean: bool = True,
    longest: bool = False,
) -> TextFeatures:
    """Encode prompts for a text-conditioned host.

    Every prompt is padded to `max_length`, so its features do not depend on its neighbours in the batch. A
    tokenizer may bring its own `preprocess_prompt(str) -> str`; without one the prompt takes the caption
    cleaner twice, as the published T5-conditioned models expect (LlamaGen, arXiv 2406.06525).

    Args:
        tokenizer: a Hugging Face tokenizer.
        text_encoder: a module that maps `input_ids`, `attention_mask` `[B, T]` to `last_hidden_state`
            `[B, T, C]`: `T5EncoderModel` of any size, or `WordTextEncoder`.
        prompts: one prompt or several.
        max_length: T, the number of caption positions of the host. Longer prompts are cut, with a warning.
        device: where to put the features; the text encoder's device by default.
        dtype: type of the features; the text encoder's by default.
        clean: False to take prompts as they are, for models that were trained on whole captions.
        longest: pad to the longest prompt only, for hosts that read as many positions as there are; features then
            depend on their neighbours by rounding.

    Returns:
        Left-padded features `[B, max_length, C]` with their mask.

    Raises:
        InputError: no prompt, a prompt that is not a string or has no text, or an encoder that overflowed.
    """
    with _TOKENIZING:
        ids, mask = _tokenize(tokenizer, _as_list(prompts), max_length, clean, longest)
    source = text_encoder.device
    hidden = text_encoder(input_ids=ids.to(source), attention_mask=mask.to(source)).last_hidden_state
    encoded = TextFeatures.from_hidden_states(hidden, mask.to(source))
    check_finite(encoded.features, text_encoder, hidden.dtype, "features of the prompts")
    return encoded.to(device, dtype)


def _tokenize(
    tokenizer: Any, prompts: list[Any], max_length: int, clean: bool, longest: bool
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of prompts; warns of those that are cut."""
    texts = [prompt_text(tokenizer, prompt, clean) for prompt in prompts]
    tokens = tokenizer(
        texts,
        max_length=max_length,
        padding="longest" if longest else "max_length",
        truncation=True,
        return_attention_mask=True,
        return_tensors="np",
    )
    # not "pt", whose tensors are born on torch's default device, whatever that is
    ids, mask = (torch.from_numpy(tokens[name]).long() for name in ("input_ids", "attention_mask"))
    for row in (mask.sum(1) == max_length).nonzero().flatten().tolist():
        if len(tokenizer(texts[row], truncation=True, max_length=max_length + 1)["input_ids"]) > max_length:
            logger.warning(
                "the prompt %r is longer than %d tokens; the rest is cut.", _head(texts[row]), max_length
            )
    return ids, mask


def _as_list(prompts: str | Sequence[str]) -> list[Any]:
    texts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Sequence) else list(prompts)
    if not texts:
        raise InputError("there is no prompt to encode; give at least one.")
    return texts


def prompt_text(tokenizer: Any, prompt: Any, clean: bool = True) -> str:
    """A prompt as it goes to the tokenizer: after the tokenizer's own `preprocess_prompt`, or the caption cleaner.

    Args:
        clean: False for neither.

    Raises:
        InputError: not a string, or nothing of it is left.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, not {type(prompt).__name__}.")
    preprocess: Callable[[str], str] = getattr(tokenizer, "preprocess_prompt", clean_prompt) if clean else str
    # a lone surrogate, as from a badly decoded file, cannot be written as UTF-8 and would stop the tokenizer
    text = preprocess(prompt.encode("utf-8", "replace").decode())
    if not text.strip():
        if prompt.strip() and preprocess is clean_prompt:
            raise InputError(
                f"the prompt {_head(prompt)!r} holds no text after the caption cleaner, which T5 models need, has "
                f"taken out {what_is_cleaned(prompt)}; describe the image in English words."
            )
        raise InputError(f"the prompt {_head(prompt)!r} holds no text; describe the image in words.")
    return text


def _head(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"


class WordTokenizer(PreTrainedTokenizerFast):
    """Whole words from a closed vocabulary; case, accents and punctuation are ignored.

    A standard fast tokenizer (`tokenizer.json`), so `save_pretrained` and `from_pretrained` work, also as a
    pipeline component. Every prompt ends with `<eos>`; a word outside the vocabulary becomes `<unk>`. The
    names of these tokens in a prompt have no special meaning.
    """

    model_input_names: list[str] = ["input_ids", "attention_mask"]  # noqa: RUF012

    @classmethod
    def from_words(cls, words: Iterable[str], max_length: int = 32) -> WordTokenizer:
        """Build a tokenizer.

        Args:
            words: the vocabulary; ids are given in sorted order, after the three special tokens.
            max_length: the longest prompt in tokens, `<eos>` included.

        Raises:
            InputError: no word, or an entry the tokenizer would split or alter.
        """
        backend = Tokenizer(models.WordLevel({PAD: 0, UNKNOWN: 1, END: 2}, unk_token=UNKNOWN))
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            ]
        )
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        vocabulary = sorted(set(words))
        odd = [w for w in vocabulary if not w or " " in w or backend.normalizer.normalize_str(w) != w]
        if odd or not vocabulary:
            raise InputError(f"a vocabulary needs lower-case words without punctuation; got {odd[:5]}.")
        ids = {word: i for i, word in enumerate([PAD, UNKNOWN, END, *vocabulary])}
        backend.model = models.WordLevel(ids, unk_token=UNKNOWN)
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, ids[END])]
        )
        return cls(
            tokenizer_object=backend,
            pad_token=PAD,
            unk_token=UNKNOWN,
            eos_token=END,
            padding_side="right",
            model_max_length=max_length,
            split_special_tokens=True,
        )

    def preprocess_prompt(self, prompt: str) -> str:
        """The words of the prompt as the vocabulary spells them, separated by single spaces."""
        return " ".join(self.words(prompt))

    def words(self, prompt: str) -> list[str]:
        """The normalised words of a prompt, known or not."""
        normalized = self.backend_tokenizer.normalizer.normalize_str(prompt)
        return normalized.split()

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, each once, in order of appearance."""
        vocabulary = self.get_vocab()
        return list(dict.fromkeys(word for word in self.words(prompt) if word not in vocabulary))


class WordTextEncoder(ModelMixin, ConfigMixin):
    """A small bidirectional transformer over word ids: pre-norm, learned positions.

    Hosts of the LlamaGen kind see a caption through a uniform average over its positions (their caption
    positions carry no rotary phase, so every attention score is zero). Word embeddings would lose which
    adjective belongs to which noun there; contextual features keep it.

    Args:
        vocab_size: number of word ids.
        dim: feature channels C.
        num_layers: transformer layers.
        num_heads: attention heads; must divide `dim`.
        ffn_dim: width of the feed-forward layers.
        max_length: the longest sequence.
        pad_token_id: the id of padding.
        dropout: dropout rate in training.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        num_layers: int = 3,
        num_heads: int = 4,
        ffn_dim: int = 1024,
        max_length: int = 32,
        pad_token_id: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, dim, padding_idx=pad_token_id)
        self.position_embedding = nn.Embedding(max_length, dim)
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, ffn_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        # without gain, so that the features have unit RMS whatever the training objective prefers
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.initialize()

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights: normal with standard deviation 0.02, residual outputs scaled by depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue  # biases and norms keep the defaults of their modules
            std = 0.02
            if name.endswith(("out_proj.weight", "linear2.weight")):
                std /= (2 * self.config.num_layers) ** 0.5
            nn.init.normal_(parameter, std=std, generator=generator)
        with torch.no_grad():
            self.word_embedding.weight[self.config.pad_token_id].zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """Encode word ids.

        Args:
            input_ids: `[B, T]` int64, T at most `max_length`.
            attention_mask: `[B, T]` bool or 0/1; at least one valid position per row. All valid if None.

        Returns:
            An output with `last_hidden_state` `[B, T, C]`; padded positions hold arbitrary values.

        Raises:
            InputError: more positions than `max_length`.
        """
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise InputError(
                f"{length} caption positions were asked of a text encoder that has {self.config.max_length}; "
                "lower max_length."
            )
        hidden = self.word_embedding(input_ids) + self.position_embedding.weight[:length]  # [B, T, C]
        padding = None if attention_mask is None else ~attention_mask.bool()
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))
