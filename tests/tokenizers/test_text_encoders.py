"""Prompts to left-padded features: the published padding rule, T5, the word-level pair, bad prompts."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.golden_cases import llamagen_tensors
from varaccel.errors import InputError, NumberError
from varaccel.tokenizers.captions import clean_caption, clean_prompt
from varaccel.tokenizers.text import TextFeatures, WordTextEncoder, WordTokenizer, encode_prompts

WORDS = ("a", "red", "blue", "green", "sphere", "cube", "left", "of")
PROMPTS = ["a red sphere", "A blue CUBE left of a green sphere", "cube"]


@pytest.fixture(scope="module")
def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """A random T5 encoder and a unigram tokenizer that knows `WORDS` and single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [
        (letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tokenizer, T5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def words() -> tuple[WordTokenizer, WordTextEncoder]:
    tokenizer = WordTokenizer.from_words(WORDS, max_length=16)
    encoder = WordTextEncoder(len(tokenizer), dim=32, num_layers=2, num_heads=4, ffn_dim=64, max_length=16)
    encoder.initialize(torch.Generator().manual_seed(0))
    return tokenizer, encoder.eval()


@pytest.fixture(params=["t5", "words"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(request.param)


def left_padded(hidden: Tensor, length: int) -> Tensor:
    """The rule, spelled out for one row: zeros, then the valid vectors in their order."""
    return torch.cat([torch.zeros_like(hidden[length:]), hidden[:length]])


# --- padding ---


def test_padding_agrees_with_the_recorded_features_of_the_published_code() -> None:
    recorded = llamagen_tensors("t2i_logits")
    result = TextFeatures.from_hidden_states(recorded["t5_features"], recorded["t5_mask"])
    assert torch.equal(result.features, recorded["caption_emb"])
    assert torch.equal(result.mask, recorded["caption_mask"].bool())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**16))
def test_padding_keeps_the_order_and_is_exactly_zero(lengths: list[int], seed: int) -> None:
    hidden = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    dirty = hidden.masked_fill(~mask[..., None], float("nan"))
    result = TextFeatures.from_hidden_states(dirty, mask.long())
    assert result.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        assert torch.equal(result.features[row], left_padded(hidden[row], length))
        assert result.mask[row].tolist() == [False] * (6 - length) + [True] * length


def test_left_padded_input_stays_as_it_is() -> None:
    hidden = torch.randn(1, 5, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    result = TextFeatures.from_hidden_states(hidden, mask)
    assert torch.equal(result.features, hidden * mask[..., None])
    assert torch.equal(result.mask, mask.bool())


# --- both encoders ---


def test_features_are_the_last_hidden_states_moved_to_the_right(pair: tuple[Any, Any]) -> None:
    tokenizer, encoder = pair
    result = encode_prompts(tokenizer, encoder, PROMPTS, max_length=14)
    assert result.features.shape == (3, 14, 32)
    for row, prompt in enumerate(PROMPTS):
        alone = tokenizer(prompt.lower(), return_tensors="pt")  # no padding at all
        with torch.no_grad():
            hidden = encoder(alone["input_ids"], alone["attention_mask"]).last_hidden_state[0]
        length = hidden.shape[0]
        assert result.lengths[row] == length
        assert torch.count_nonzero(result.features[row, : 14 - length]) == 0
        torch.testing.assert_close(result.features[row, 14 - length :], hidden, atol=1e-5, rtol=1e-4)


def test_a_prompt_does_not_depend_on_its_neighbours(pair: tuple[Any, Any]) -> None:
    together = encode_prompts(*pair, PROMPTS, max_length=14)
    for row, prompt in enumerate(PROMPTS):
        alone = encode_prompts(*pair, prompt, max_length=14)
        assert torch.equal(alone.mask[0], together.mask[row])
        torch.testing.assert_close(alone.features[0], together.features[row], atol=1e-6, rtol=1e-5)


def test_case_and_outer_space_do_not_matter(pair: tuple[Any, Any]) -> None:
    one, other = (encode_prompts(*pair, text, max_length=14) for text in ("a red cube", "  A Red CUBE\n"))
    assert torch.equal(one.features, other.features)


def test_words_are_seen_in_their_order_and_context(pair: tuple[Any, Any]) -> None:
    one, other = (
        encode_prompts(*pair, text, max_length=14).features[0, -1]
        for text in ("red cube left of blue sphere", "blue cube left of red sphere")
    )
    assert (one - other).abs().max() > 1e-4  # the end token, the same in both, tells them apart


def test_type_and_device_of_the_features(pair: tuple[Any, Any]) -> None:
    result = encode_prompts(*pair, PROMPTS, max_length=14, device="cpu", dtype=torch.bfloat16)
    assert result.features.dtype == torch.bfloat16
    assert result.mask.dtype == torch.bool
    assert not result.features.requires_grad


def test_long_prompts_are_cut_with_a_warning(pair: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, encoder = pair
    exact = " ".join(["cube"] * 13)  # 13 words and the end token fill 14 positions
    with caplog.at_level(logging.WARNING):
        full = encode_prompts(tokenizer, encoder, exact, max_length=14)
        assert not caplog.records
        start = time.perf_counter()
        cut = encode_prompts(tokenizer, encoder, ["cube", "cube " * 2_500], max_length=14)
        assert time.perf_counter() - start < 3
    assert [record.message.count("longer than 14 tokens") for record in caplog.records] == [1]
    torch.testing.assert_close(cut.features[1], full.features[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prompts", ["", "   \n", ["a cube", ""], []])
def test_prompts_without_text_are_refused(pair: tuple[Any, Any], prompts: Any) -> None:
    with pytest.raises(InputError):
        encode_prompts(*pair, prompts, max_length=14)


@pytest.mark.parametrize("prompts", [None, 3, b"a cube", ["a cube", None], [["a cube"]], {"a cube": 1}])
def test_prompts_that_are_not_strings_are_refused(pair: tuple[Any, Any], prompts: Any) -> None:
    with pytest.raises(InputError, match="string"):
        encode_prompts(*pair, prompts, max_length=14)


def test_broken_unicode_is_no_obstacle(pair: tuple[Any, Any]) -> None:
    result = encode_prompts(*pair, "a red \ud800 cube \x00", max_length=14)
    assert result.features.isfinite().all()


def test_an_overflowing_encoder_is_reported(pair: tuple[Any, Any]) -> None:
    tokenizer, encoder = pair

    class Overflowing:
        device = torch.device("cpu")

        def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            output = encoder(input_ids, attention_mask)
            output.last_hidden_state = output.last_hidden_state.half() * 1e5
            return output

    with pytest.raises(
        NumberError, match=r"Overflowing gave NaN or infinity in float16 .* load it in bfloat16"
    ):
        encode_prompts(tokenizer, Overflowing(), "a cube", max_length=14)


# --- T5 ---


def test_t5_prompts_are_cleaned_twice(t5: tuple[T5Tokenizer, T5EncoderModel]) -> None:
    tokenizer, encoder = t5
    dirty = "A red sphere (www.spheres.com) by %2540nick"
    assert clean_caption(dirty) != clean_prompt(dirty) == "a red sphere by"
    result = encode_prompts(tokenizer, encoder, dirty, max_length=24)
    expected = tokenizer("a red sphere by", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = encoder(expected).last_hidden_state[0]
    assert result.lengths.tolist() == [hidden.shape[0]]
    torch.testing.assert_close(result.features[0, -hidden.shape[0] :], hidden, atol=1e-5, rtol=1e-4)


def test_t5_prompts_of_nothing_but_litter_are_refused(t5: tuple[T5Tokenizer, T5EncoderModel]) -> None:
    with pytest.raises(InputError, match="no text"):
        encode_prompts(*t5, "http://example.com", max_length=24)


# --- words ---


def test_word_ids_end_mark_and_unknown_words() -> None:
    tokenizer = WordTokenizer.from_words(WORDS)
    ids = tokenizer("A red, zébra left-of a CUBE!")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "red", "<unk>", "left", "of", "a", "cube", "<eos>"]


def test_unknown_words_are_reported_once_in_order() -> None:
    tokenizer = WordTokenizer.from_words(WORDS)
    assert tokenizer.unknown_words("A shiny red-hot Cube, shiny: 汉字 & 2 zebras") == [
        *("shiny", "hot", "汉字", "2", "zebras")
    ]
    assert tokenizer.unknown_words("a red CUBE!") == []


def test_prompts_without_words_are_refused(words: tuple[WordTokenizer, WordTextEncoder]) -> None:
    with pytest.raises(InputError, match="no text"):
        encode_prompts(*words, "!!! ...", max_length=14)


def test_names_of_special_tokens_are_ordinary_words(words: tuple[WordTokenizer, WordTextEncoder]) -> None:
    tokenizer, _ = words
    assert tokenizer.unknown_words("a <pad> cube <eos>") == ["pad", "eos"]
    one = encode_prompts(*words, "a <pad> cube <eos> red", max_length=14)
    other = encode_prompts(*words, "a zebra cube zebra red", max_length=14)
    assert torch.equal(one.features, other.features)


@pytest.mark.parametrize("vocabulary", [[], ["Red"], ["two words"], ["left-of"], [""], ["café"]])
def test_vocabularies_the_tokenizer_would_alter_are_refused(vocabulary: list[str]) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        WordTokenizer.from_words(vocabulary)


@given(st.text(max_size=60))
def test_any_text_is_tokenized(text: str) -> None:
    tokenizer = WordTokenizer.from_words(WORDS)
    known = [word for word in tokenizer.words(text) if word in WORDS]
    ids = tokenizer(text.encode("utf-8", "replace").decode())["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    tokens = tokenizer.convert_ids_to_tokens(ids[:-1])
    assert [token for token in tokens if token != "<unk>"] == known
    assert tokenizer.pad_token_id not in ids


def test_word_features_have_unit_rms(words: tuple[WordTokenizer, WordTextEncoder]) -> None:
    result = encode_prompts(*words, PROMPTS, max_length=14)
    rms = result.features.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, result.mask.float(), atol=1e-2, rtol=0)


def test_word_encoder_refuses_too_many_positions(
    words: tuple[WordTokenizer, WordTextEncoder],
) -> None:
    with pytest.raises(InputError, match="has 16"):
        encode_prompts(*words, "a cube", max_length=17)


def test_default_word_encoder_is_small() -> None:
    encoder = WordTextEncoder(vocab_size=64)
    assert sum(parameter.numel() for parameter in encoder.parameters()) <= 2_500_000


class Pair(DiffusionPipeline):
    """Holds the two components, as a text-to-image pipeline does."""

    def __init__(self, tokenizer: WordTokenizer, text_encoder: WordTextEncoder) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)


def test_word_pair_survives_a_pipeline_folder(
    words: tuple[WordTokenizer, WordTextEncoder], tmp_path: Path
) -> None:
    Pair(*words).save_pretrained(tmp_path)
    loaded = Pair.from_pretrained(tmp_path)
    assert isinstance(loaded.tokenizer, WordTokenizer)
    assert isinstance(loaded.text_encoder, WordTextEncoder)
    assert not loaded.text_encoder.training
    assert loaded.tokenizer.model_max_length == 16
    assert loaded.tokenizer.unknown_words("a purple <pad> cube") == ["purple", "pad"]
    before = encode_prompts(*words, [*PROMPTS, "a <pad> zebra"], max_length=16)
    after = encode_prompts(loaded.tokenizer, loaded.text_encoder, [*PROMPTS, "a <pad> zebra"], max_length=16)
    assert torch.equal(before.features, after.features)


# --- threads ---


class StatefulTokenizer:
    """Does with padding and truncation what fast tokenizers do, slowly: it sets them, then reads them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._state: dict[str, Any] = {}

    def __call__(self, texts: Any, *, max_length: int, padding: Any = False, **options: Any) -> Any:
        self._state = {"max_length": max_length, "padding": padding}
        time.sleep(0.001)
        return self._tokenizer(texts, **self._state, **options)


@pytest.mark.parametrize("stateful", [False, True], ids=["itself", "slowed"])
def test_threads_do_not_change_each_others_padding(pair: tuple[Any, Any], stateful: bool) -> None:
    """A prompt as long as the limit is tokenized once more, without padding, to see whether it was cut."""
    tokenizer, encoder = pair
    shared = StatefulTokenizer(tokenizer) if stateful else tokenizer
    prompts = [
        ("a red cube left of " * 6, 12),
        ("cube", 12),
        ("a red cube left of " * 6, 16),
        ("a sphere", 16),
    ]

    def features(choice: int) -> Tensor:
        prompt, length = prompts[choice % len(prompts)]
        return encode_prompts(shared, encoder, prompt, max_length=length).features

    alone = [features(choice) for choice in range(len(prompts))]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(features, range(60)))
    assert all(torch.equal(found, alone[i % len(alone)]) for i, found in enumerate(together))
