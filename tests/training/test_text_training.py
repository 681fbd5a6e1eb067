"""Training of the word-level encoder: the answers it learns from, learning, resuming, exporting."""

from __future__ import annotations

from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutput

from varaccel.errors import CheckpointError
from varaccel.scenes import Caption, caption, sample_scene
from varaccel.scenes.grammar import (
    COLOR_WORDS,
    FLOOR_PHRASES,
    MATERIAL_WORDS,
    RELATION_PHRASES,
    SHAPE_WORDS,
    SIZE_WORDS,
    TIME_PHRASES,
)
from varaccel.tokenizers.text import WordTextEncoder, WordTokenizer, encode_prompts
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
from varaccel.training.run import Budget
from varaccel.training.text import (
    QuestionHead,
    TextReader,
    TextRecipe,
    build_reader,
    caption_stream,
    collate,
    held_out_captions,
    reading_accuracy,
    train_text_encoder,
)

TINY = TextRecipe(dim=48, num_layers=2, ffn_dim=96, batch_size=16, peak=4e-3, warmup_steps=20, bfloat16=False)
ALWAYS_LOOSE = Looseness(untouched=0.0, omitted=0.4, unknown=0.2, inserted=0.1)
SPELLINGS = {"shape": SHAPE_WORDS, "color": COLOR_WORDS, "material": MATERIAL_WORDS, "size": SIZE_WORDS}


def drawn(seed: int) -> Caption:
    return sample_caption(np.random.default_rng(seed))


def answers(stated: StatedCaption) -> dict[str, str]:
    targets = stated.caption_targets()
    return {fact: classes[i] for (fact, classes), i in zip(CAPTION_FACTS.items(), targets, strict=True)}


def read(words: list[str | None]) -> tuple[list[dict[str, str]], str | None, str | None, str | None]:
    """An independent reading of a caption's words: attributes by shape word, and the stated phrases."""
    text = " ".join(word or "?" for word in words)

    def find(table: dict[str, tuple[str, ...]]) -> str | None:
        return next((k for k, phrases in table.items() for p in phrases if f" {p} " in f" {text} "), None)

    floor, time, relation = find(FLOOR_PHRASES), find(TIME_PHRASES), find(RELATION_PHRASES)
    for phrase in (p for phrases in FLOOR_PHRASES.values() for p in phrases):
        text = f" {text} ".replace(f" {phrase} ", " ").strip()
    objects, current = [], {}
    for word in text.split():
        for name, table in SPELLINGS.items():
            for value, spellings in table.items():
                if word in spellings:
                    current[name] = value
        if "shape" in current:
            objects.append(current)
            current = {}
    return objects, relation, floor, time


# --- facts ---


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_parts_reassemble_to_the_caption(seed: int) -> None:
    stated = drawn(seed)
    assembled = take_apart(stated).assemble()
    assert " ".join(str(word.text) for word in assembled.words) == stated.text
    said = [
        {name: getattr(mention, name) for name in SPELLINGS if getattr(mention, name)}
        for mention in stated.mentions
    ]
    assert list(assembled.mentions) == said
    assert (assembled.floor, assembled.time_of_day) == (stated.floor, stated.time_of_day)
    assert assembled.relation == (stated.statements[0].relation if stated.statements else None)


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_answers_are_what_the_words_say(seed: int) -> None:
    stated = take_apart(drawn(seed)).assemble()
    objects, relation, floor, time = read([word.text for word in stated.words])
    given_answers = answers(stated)
    assert given_answers["objects"] == str(len(objects))
    assert given_answers["relation"] == (relation or "unstated")
    assert given_answers["floor"] == (floor or "unstated")
    assert given_answers["time of day"] == (time or "unstated")
    for i in range(3):
        for name in SPELLINGS:
            expected = objects[i].get(name, "unstated") if i < len(objects) else "absent"
            assert given_answers[f"mention {i} {name}"] == expected


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_loose_captions_state_only_what_their_words_say(seed: int) -> None:
    generator = np.random.default_rng(seed)
    stated = loosen(take_apart(sample_caption(generator)), generator, ALWAYS_LOOSE)
    _, relation, floor, time = read([word.text for word in stated.words])
    objects, *_ = read([word.text for word in stated.words if word.mention >= 0])
    if all("shape" in mention for mention in stated.mentions):
        assert list(stated.mentions) == objects
    for said, found in ((stated.relation, relation), (stated.floor, floor), (stated.time_of_day, time)):
        # an unknown word inside "on a ? floor" hides nothing, one inside "to the ? of" does
        assert said == found or found is None
    for word, row in zip(stated.words, stated.word_targets(), strict=True):
        if word.mention < 0:
            assert set(row) == {NO_ANSWER}
        elif word.states and word.text:
            classes = WORD_FACTS[word.states]
            value = classes[row[list(WORD_FACTS).index(word.states)]]
            assert word.text in SPELLINGS[word.states][value]


def test_places_follow_the_relation() -> None:
    seen = set()
    for seed in range(300):
        scene = sample_scene(seed) if seed < 5 else None
        stated = caption(scene, seed) if scene else drawn(seed)
        found = answers(take_apart(stated).assemble())
        if not stated.statements:
            assert all(found[f"{place} 0 shape"] == "absent" for place in ("left", "right", "front", "back"))
            continue
        relation = stated.statements[0].relation
        own, other = {
            "left of": ("left", "right"),
            "right of": ("right", "left"),
            "in front of": ("front", "back"),
            "behind": ("back", "front"),
        }[relation]
        subjects = [m for m in stated.mentions if m.index in {s.subject for s in stated.statements}]
        references = [m for m in stated.mentions if m.index in {s.reference for s in stated.statements}]
        for place, group in ((own, subjects), (other, references)):
            assert [found[f"{place} {i} color"] for i in range(len(group))] == [m.color for m in group]
        assert {k.split()[0] for k, v in found.items() if v != "absent" and k.endswith("0 shape")} == {
            *("mention", own, other)
        }
        seen.add((relation, len(subjects), len(references)))
    assert len(seen) == 12  # four relations, each with 1-1, 1-2 and 2-1 objects


def test_batches_match_the_tokenizer_and_their_step() -> None:
    tokenizer, _ = build_reader(TINY)
    first, second = islice(caption_stream(TINY, tokenizer), 2)
    again = next(caption_stream(TINY, tokenizer, first_step=1))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    assert first.ids.shape != second.ids.shape or not torch.equal(first.ids, second.ids)
    stated = [drawn(seed) for seed in range(8)]
    batch = collate([take_apart(one).assemble() for one in stated], tokenizer)
    plain = tokenizer([one.text for one in stated], padding=True, return_tensors="pt")
    assert torch.equal(batch.ids, plain["input_ids"])
    assert torch.equal(batch.mask, plain["attention_mask"].bool())
    assert batch.word_targets.shape == (*batch.ids.shape, len(WORD_FACTS))
    assert batch.ids.max() < len(tokenizer)
    assert not (batch.ids == tokenizer.unk_token_id).any()


# --- heads and reading ---


def test_question_heads_give_no_weight_to_answers_that_do_not_exist() -> None:
    questions = {"two": ("a", "b"), "four": ("a", "b", "c", "d")}
    head = QuestionHead(8, questions, hidden=16)
    shares = head(torch.randn(5, 8, generator=torch.Generator().manual_seed(0))).softmax(-1)
    assert shares.shape == (5, 2, 4)
    assert torch.count_nonzero(shares[:, 0, 2:]) == 0
    assert (shares[:, 1] > 0).all()


def test_the_mean_ignores_padding() -> None:
    tokenizer, reader = build_reader(TINY)
    stated = [take_apart(drawn(seed)).assemble() for seed in range(6)]
    batch = collate(stated, tokenizer)
    reader.eval()
    _, together = reader.features(batch.ids, batch.mask)
    for row, one in enumerate(stated):
        alone = collate([one], tokenizer)
        torch.testing.assert_close(
            reader.features(alone.ids, alone.mask)[1][0], together[row], atol=1e-5, rtol=1e-4
        )


class Told(torch.nn.Module):
    """A head that answers all captions right, but the first `wrong` questions wrong."""

    def __init__(self, stated: list[StatedCaption], wrong: int) -> None:
        super().__init__()
        targets = torch.tensor([one.caption_targets() for one in stated])
        targets[:, :wrong] = (targets[:, :wrong] + 1) % 2
        self.logits = torch.nn.functional.one_hot(targets, max(map(len, CAPTION_FACTS.values())))

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_accuracy_counts_right_answers() -> None:
    tokenizer, reader = build_reader(TINY)
    stated = [take_apart(drawn(seed)).assemble() for seed in range(20)]
    reader.mlp = Told(stated, wrong=0)
    perfect = reading_accuracy(reader, stated, tokenizer)
    assert perfect["mlp"] == perfect["mlp captions"] == perfect["mlp color"] == 1.0
    reader.mlp = Told(stated, wrong=1)
    flawed = reading_accuracy(reader, stated, tokenizer)
    assert flawed["mlp objects"] == flawed["mlp captions"] == 0.0
    assert flawed["mlp color"] == 1.0
    assert 0.9 < flawed["mlp"] < 1.0
    assert perfect["linear captions"] < 0.1  # the untrained head knows nothing


# --- training ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextReader]:
    folder = tmp_path_factory.mktemp("text")
    return folder, train_text_encoder(folder, Budget(steps=120), TINY, log_every=10)


@pytest.mark.slow
def test_training_learns_to_read(trained: tuple[Path, TextReader]) -> None:
    folder, reader = trained
    tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer")
    stated = held_out_captions(40)
    _, untrained = build_reader(TINY)
    before, after = (reading_accuracy(r, stated, tokenizer) for r in (untrained, reader))
    assert after["word"] > before["word"] + 0.3
    assert after["mlp"] > before["mlp"] + 0.15
    assert after["linear"] > before["linear"] + 0.15


def test_export_gives_back_the_encoder(trained: tuple[Path, TextReader]) -> None:
    folder, reader = trained
    tokenizer = WordTokenizer.from_pretrained(folder / "tokenizer")
    encoder = WordTextEncoder.from_pretrained(folder / "text_encoder")
    prompts = ["a red sphere left of a blue cube", "two zebras"]
    stored = encode_prompts(tokenizer, encoder, prompts, max_length=32)
    fresh = encode_prompts(tokenizer, reader.encoder, prompts, max_length=32)
    assert torch.equal(stored.features, fresh.features)
    assert tokenizer.unknown_words(prompts[1]) == ["two", "zebras"]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_resumed_run_equals_an_unbroken_one(
    bfloat16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, batch_size=8, bfloat16=bfloat16)
    unbroken = train_text_encoder(tmp_path / "a", Budget(steps=6), recipe)

    class Stop(Exception):
        pass

    passes = count(1)
    forward = WordTextEncoder.forward

    def interrupted(self: WordTextEncoder, *inputs: torch.Tensor) -> BaseModelOutput:
        if next(passes) == 4:
            raise Stop
        return forward(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(WordTextEncoder, "forward", interrupted)
        with pytest.raises(Stop):
            train_text_encoder(tmp_path / "b", Budget(steps=6), recipe)
    assert torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = train_text_encoder(tmp_path / "b", Budget(steps=6), recipe)
    for one, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_recipe_is_refused(trained: tuple[Path, TextReader]) -> None:
    with pytest.raises(CheckpointError, match="recipe"):
        train_text_encoder(trained[0], Budget(steps=120), replace(TINY, dim=32))
