"""Slot bookkeeping against a slow transcript of what was read, told apart by the keys that stand in the slots."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varaccel.hosts.causal.cache_slots import CacheSlots, Visibility, lane_draft_slots, spread
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache

EMPTY = 0.0
"""The key in a slot that nothing was written to."""


def numbered(*shape: int) -> Tensor:
    """A table in which no number stands twice, and no zero."""
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)


@dataclass
class Harness:
    """Cache slots and a network without layers: it writes a key of its own for every entry, and looks.

    Keys are numbers, none used twice, so that the keys in visible slots say which tokens an entry sees.
    """

    batch: int
    positions: int
    prefix: int = 2
    draft_slots: int = 0
    branches: int = 1
    mask: Tensor | None = None
    branches_differ: bool = False
    visibility: Visibility = "encoded"
    positional_rows: int = 1
    modulation_width: int = 0
    last_key: float = 0.0

    def __post_init__(self) -> None:
        rows = self.batch * self.branches
        total = self.prefix + self.draft_slots + self.positions + 1
        self.cache = KVCache(
            layers=2,
            batch=rows,
            heads=1,
            slots=total,
            head_dim=1,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        places = self.prefix + self.positions
        # a row of the table for every row of the cache, or one for all
        self.positional = numbered(self.positional_rows, places, 1, 2)
        # for every place, or one for all; 0 is none
        widths = {0: None, 1: numbered(rows, 1, 3), 2: numbered(rows, places, 3)}
        self.modulation = widths[self.modulation_width]
        self.slots = CacheSlots(
            self.cache,
            prefix=self.prefix,
            positional=self.positional,
            modulation=self.modulation,
            draft_slots=self.draft_slots,
            mask=self.mask,
            branches_differ=self.branches_differ,
            visibility=self.visibility,
        )
        self.prefix_keys = self.new_keys(rows, self.prefix)
        self.write(torch.arange(self.prefix).expand(rows, -1), self.prefix_keys)

    def new_keys(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        keys = torch.arange(1, count + 1, dtype=torch.float64).view(shape) + self.last_key
        self.last_key += count
        return keys

    def write(self, slots: Tensor, keys: Tensor) -> None:
        """Keys [R, P]; values are their negatives."""
        stored = keys.unsqueeze(1).unsqueeze(-1)
        for layer in (0, 1):
            self.cache.update(layer, slots, stored, -stored)

    def read(
        self,
        positions: Tensor,
        draft_slots: Tensor | None = None,
        visible: Tensor | None = None,
        *,
        rows: int | None = None,
        length: int | None = None,
    ) -> tuple[Tensor, list[list[Counter[float]]]]:
        """A pass over entries at `positions` [B, F]: their keys [R, F], and the keys that each sees."""
        rows = rows or self.batch * self.branches
        inputs = self.slots.attention_inputs(
            positions, rows=rows, draft_slots=draft_slots, visible=visible, length=length
        )
        keys = self.new_keys(rows, positions.shape[1])
        assert inputs.slots is not None
        assert inputs.cache is self.cache
        self.write(inputs.slots, keys)
        self.check_places(inputs, positions, rows)
        assert inputs.mask is not None
        assert inputs.mask.shape[:3] == (rows, 1, positions.shape[1])
        assert inputs.mask.shape[3] == (length or self.cache.keys.shape[3])
        stored = self.cache.keys[0, :, 0, :, 0]
        return keys, [
            [Counter(stored[row, : inputs.mask.shape[3]][entry].tolist()) for entry in inputs.mask[row, 0]]
            for row in range(rows)
        ]

    def check_places(self, inputs: AttentionInputs, positions: Tensor, rows: int) -> None:
        """Every entry is told the place that it stands for, wherever it is kept."""
        assert inputs.positional is not None
        assert (inputs.modulation is None) == (self.modulation is None)
        for row in range(rows):
            for entry, position in enumerate(positions[row % self.batch].tolist()):
                if position < 0:
                    continue
                place = self.prefix + position
                told = inputs.positional[row, entry]
                assert torch.equal(told, self.positional[row % self.positional_rows, place])
                if inputs.modulation is not None and self.modulation is not None:
                    own = self.modulation[row, place if self.modulation_width == 2 else 0]
                    assert torch.equal(inputs.modulation[row].expand(positions.shape[1], -1)[entry], own)

    def usable(self, row: int) -> tuple[list[bool], set[int]]:
        """Which condition slots a row may look at, and which positions; it never may at draft slots and the spare."""
        slots = self.slots.usable[row].tolist()
        base = self.prefix + self.draft_slots
        assert not any(slots[self.prefix : base])
        assert not slots[-1]
        return slots[: self.prefix], {p for p in range(self.positions) if slots[base + p]}

    def kept(self, row: int, position: int) -> list[float]:
        """Keys and values of both layers in the slot of a position; values turned back."""
        slot = self.prefix + self.draft_slots + position
        keys, values = self.cache.keys[:, row, 0, slot, 0], self.cache.values[:, row, 0, slot, 0]
        return [*keys.tolist(), *(-values).tolist()]


@dataclass
class Transcript:
    """What one row of the cache holds, in terms of tokens. Knows of no slots but those that drafts are numbered by."""

    prefix: list[float]
    """keys of the condition slots in use"""
    everything: bool
    """visibility "causal": what is not there is seen as well"""
    decided: dict[int, float] = field(default_factory=dict)
    drafts: dict[int, float] = field(default_factory=dict)

    def before(self, position: int) -> list[float]:
        if self.everything:
            return [self.decided.get(p, EMPTY) for p in range(position)]
        return [key for p, key in self.decided.items() if p < position]

    def sees(self, position: int, draft_slot: int, visible: list[int]) -> Counter[float]:
        """The keys that an entry sees: the condition, decided tokens before it, itself, and the drafts it is shown."""
        itself = self.drafts[draft_slot] if draft_slot >= 0 else self.decided[position]
        shown = [self.drafts.get(slot, EMPTY) for slot in visible if slot != draft_slot]
        return Counter([*self.prefix, *self.before(position), *shown, itself])


def transcripts(harness: Harness) -> list[Transcript]:
    rows = []
    for row, keys in enumerate(harness.prefix_keys.tolist()):
        used = [1] * len(keys) if harness.mask is None else harness.mask[row].tolist()
        prefix = [key for key, u in zip(keys, used, strict=True) if u]
        rows.append(Transcript(prefix, harness.visibility == "causal"))
    return rows


def draw_entries(
    choose: random.Random, harness: Harness, drafting: bool
) -> tuple[list[list[tuple[int, int]]], Tensor, Tensor, Tensor]:
    """Random (position, draft slot) of some entries per image, also as tensors, and which draft slots they see."""
    count = choose.randint(1, 4)
    images = []
    for _ in range(harness.batch):
        free = list(range(harness.positions))
        slots = list(range(harness.draft_slots))
        choose.shuffle(free)
        choose.shuffle(slots)
        entries = []
        for _ in range(count):
            kind = choose.choice(
                ["decided", "draft", "draft", "padding"] if drafting else ["decided", "padding"]
            )
            if kind == "draft" and slots:  # several may stand for the same position
                entries.append((choose.randrange(harness.positions), slots.pop()))
            elif kind != "padding" and free:
                entries.append((free.pop(), -1))
            else:
                entries.append((-1, choose.choice([-1, 0]) if drafting else -1))
        images.append(entries)
    table = torch.tensor(images)
    chance = choose.random()
    visible = torch.tensor(
        [
            [[choose.random() < chance for _ in range(harness.draft_slots)] for _ in range(count)]
            for _ in images
        ],
        dtype=torch.bool,
    ).view(harness.batch, count, harness.draft_slots)
    return images, table[..., 0], table[..., 1], visible


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    positions=st.integers(1, 8),
    prefix=st.integers(1, 3),
    draft_slots=st.integers(0, 5),
    branches=st.sampled_from([1, 2]),
    visibility=st.sampled_from(["encoded", "causal"]),
    masked=st.booleans(),
    own_tables=st.booleans(),
    modulation_width=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_every_entry_sees_what_it_should(
    batch: int,
    positions: int,
    prefix: int,
    draft_slots: int,
    branches: int,
    visibility: Visibility,
    masked: bool,
    own_tables: bool,
    modulation_width: int,
    seed: int,
) -> None:
    """After any sequence of passes: decided and draft tokens, ragged, repeated, kept or not."""
    choose = random.Random(seed)
    rows = batch * branches
    mask = None
    differ = branches == 2 and choose.random() < 0.5
    if masked:  # the last slot is in use, as it is where conditions are padded on the left
        lists = rows if differ else batch
        used = [[choose.randint(0, 1) for _ in range(prefix - 1)] + [1] for _ in range(lists)]
        mask = torch.tensor(used).repeat(rows // lists, 1)
    harness = Harness(
        batch,
        positions,
        prefix,
        draft_slots,
        branches,
        mask,
        differ,
        visibility,
        positional_rows=rows if own_tables else 1,
        modulation_width=modulation_width,
    )
    told = transcripts(harness)
    for _ in range(6):
        if branches == 2 and choose.random() < 0.15:
            rows = batch  # guidance ends: the unconditional rows are not read any more
        drafting = draft_slots > 0 and choose.random() < 0.7
        entries, place, slot, visible = draw_entries(choose, harness, drafting)
        length = None
        if choose.random() < 0.5:
            length = prefix + draft_slots + max(0, int(place.max()) + 1)
        keys, seen = harness.read(
            place,
            slot if drafting else None,
            visible if drafting else None,
            rows=rows,
            length=length,
        )
        for row in range(rows):
            image = entries[row % batch]
            for (position, draft), key in zip(image, keys[row].tolist(), strict=True):
                if position >= 0:
                    (told[row].drafts if draft >= 0 else told[row].decided)[
                        draft if draft >= 0 else position
                    ] = key
            for entry, (position, draft) in enumerate(image):
                if position < 0:
                    assert seen[row][entry], "softmax over nothing is not a number"
                    continue
                shown = visible[row % batch, entry].nonzero()[:, 0].tolist() if drafting else []
                assert seen[row][entry] == told[row].sees(position, draft, shown)
        keep_some(choose, harness, told, rows)
        # what is decided is on record for all rows, those included that are not read any more
        for row in range(batch * branches):
            used = [True] * prefix if mask is None else mask[row].bool().tolist()
            assert harness.usable(row) == (used, set(told[row % batch].decided))


def keep_some(choose: random.Random, harness: Harness, told: list[Transcript], rows: int) -> None:
    """Move some of the drafts that every row of an image has to positions of their choice."""
    count = choose.randint(0, min(2, harness.positions))
    if not count:
        return
    slots, positions = [], []
    for image in range(harness.batch):
        there = list(told[image].drafts)
        chosen = choose.sample(there, min(count, len(there)))
        targets = choose.sample(range(harness.positions), len(chosen))
        fill = count - len(chosen)
        slots.append(chosen + [0] * fill)
        positions.append(targets + [-1] * fill)
        for row in range(image, rows, harness.batch):
            for draft, position in zip(chosen, targets, strict=True):
                told[row].decided[position] = told[row].drafts[draft]
    harness.slots.keep(torch.tensor(slots), torch.tensor(positions))
    for row in range(rows):
        for position, key in told[row].decided.items():
            assert harness.kept(row, position) == [key] * 4, "keys and values of every layer"


# -- worked by hand ------------------------------------------------------------------------------------


def keys_of(*values: Tensor) -> Counter[float]:
    return Counter(v.item() for v in values)


@pytest.mark.parametrize("visibility", ["encoded", "causal"])
def test_decided_tokens_see_what_is_encoded_up_to_themselves(visibility: Visibility) -> None:
    harness = Harness(batch=1, positions=4, visibility=visibility)
    a, b = harness.prefix_keys[0]
    first, seen = harness.read(torch.tensor([[0, 2]]))  # position 1 is not there yet
    nothing = [] if visibility == "encoded" else [torch.tensor(EMPTY)]
    assert seen[0] == [keys_of(a, b, first[0, 0]), keys_of(a, b, first[0, 0], *nothing, first[0, 1])]
    second, seen = harness.read(torch.tensor([[1]]))
    assert seen[0] == [keys_of(a, b, first[0, 0], second[0, 0])]
    third, seen = harness.read(torch.tensor([[3]]))
    assert seen[0] == [keys_of(a, b, first[0, 0], second[0, 0], first[0, 1], third[0, 0])]


def test_a_token_that_is_read_again_replaces_its_stand_in() -> None:
    harness = Harness(batch=1, positions=2)
    old, _ = harness.read(torch.tensor([[0]]))
    new, seen = harness.read(torch.tensor([[0, 1]]))
    assert seen[0][1] == keys_of(*harness.prefix_keys[0], *new[0])
    assert old.item() not in seen[0][1]


def test_draft_tokens_of_two_branches_do_not_see_each_other() -> None:
    """Two tokens for position 1 and one after each of them, in slots of their own."""
    harness = Harness(batch=1, positions=3, draft_slots=4)
    a, b = harness.prefix_keys[0]
    visible = torch.zeros(1, 5, 4, dtype=torch.bool)
    visible[0, 3, 0] = visible[0, 4, 1] = True
    keys, seen = harness.read(torch.tensor([[0, 1, 1, 2, 2]]), torch.tensor([[-1, 0, 1, 2, 3]]), visible)
    root, left, right, below_left, below_right = keys[0]
    assert seen[0] == [
        keys_of(a, b, root),
        keys_of(a, b, root, left),
        keys_of(a, b, root, right),
        keys_of(a, b, root, left, below_left),
        keys_of(a, b, root, right, below_right),
    ]
    # the right branch is kept; what was drafted is not seen in its draft slot again
    harness.slots.keep(torch.tensor([[1, 3]]), torch.tensor([[1, -1]]))
    assert harness.kept(0, 1) == [right.item()] * 4
    last, seen = harness.read(torch.tensor([[2]]))
    assert seen[0] == [keys_of(a, b, root, right, last[0, 0])]


def test_a_draft_token_does_not_see_what_stands_for_its_position() -> None:
    harness = Harness(batch=1, positions=2, draft_slots=1)
    decided, _ = harness.read(torch.tensor([[0, 1]]))
    visible = torch.zeros(1, 1, 1, dtype=torch.bool)
    draft, seen = harness.read(torch.tensor([[1]]), torch.tensor([[0]]), visible)
    assert seen[0] == [keys_of(*harness.prefix_keys[0], decided[0, 0], draft[0, 0])]


def test_padding_leaves_nothing_behind() -> None:
    harness = Harness(batch=2, positions=2, draft_slots=1)
    keys, _ = harness.read(
        torch.tensor([[0, -1], [-1, -1]]),
        torch.tensor([[-1, 0], [-1, 0]]),
        torch.ones(2, 2, 1, dtype=torch.bool),
    )
    harness.slots.keep(torch.tensor([[0], [0]]), torch.tensor([[-1], [-1]]))
    assert harness.kept(0, 0) == [keys[0, 0].item()] * 4
    for row, position in ((0, 1), (1, 0), (1, 1)):
        assert harness.kept(row, position) == [EMPTY] * 4
    last, seen = harness.read(torch.tensor([[1], [1]]))
    assert seen[0] == [keys_of(*harness.prefix_keys[0], keys[0, 0], last[0, 0])]
    assert seen[1] == [keys_of(*harness.prefix_keys[1], last[1, 0])]


def test_unused_condition_slots_are_not_seen() -> None:
    harness = Harness(batch=2, positions=1, prefix=3, mask=torch.tensor([[0, 0, 1], [0, 1, 1]]))
    keys, seen = harness.read(torch.tensor([[0], [0]]))
    assert seen[0] == [keys_of(harness.prefix_keys[0, 2], keys[0, 0])]
    assert seen[1] == [keys_of(*harness.prefix_keys[1, 1:], keys[1, 0])]


def test_both_branches_of_guidance_keep_their_own_keys() -> None:
    harness = Harness(batch=1, positions=2, draft_slots=1, branches=2)
    keys, seen = harness.read(
        torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2, 1, dtype=torch.bool)
    )
    harness.slots.keep(torch.tensor([[0]]), torch.tensor([[1]]))
    for row in (0, 1):
        assert seen[row][1] == keys_of(*harness.prefix_keys[row], *keys[row])
        assert harness.kept(row, 1) == [keys[row, 1].item()] * 4


def test_branches_of_guidance_with_prompts_of_their_own() -> None:
    mask = torch.tensor([[1, 1], [0, 1]])
    harness = Harness(batch=1, positions=2, branches=2, mask=mask, branches_differ=True)
    keys, seen = harness.read(torch.tensor([[0]]))
    assert seen[0] == [keys_of(*harness.prefix_keys[0], keys[0, 0])]
    assert seen[1] == [keys_of(harness.prefix_keys[1, 1], keys[1, 0])]
    more, seen = harness.read(torch.tensor([[1]]), rows=1)
    assert seen[0] == [keys_of(*harness.prefix_keys[0], keys[0, 0], more[0, 0])]


def test_the_condition_is_read_in_its_own_slots() -> None:
    harness = Harness(batch=1, positions=3, prefix=2, draft_slots=2, branches=2, modulation_width=2)
    inputs = harness.slots.prefill_inputs(None)
    assert inputs.causal
    assert inputs.slots is not None
    assert inputs.slots.tolist() == [0, 1]
    assert inputs.length == 2
    assert inputs.positional is not None
    assert torch.equal(inputs.positional, harness.positional[:, :2])
    assert harness.modulation is not None
    assert inputs.modulation is not None
    assert torch.equal(inputs.modulation, harness.modulation[:, :2])
    masked = harness.slots.prefill_inputs(torch.ones(2, 1, 2, 2, dtype=torch.bool))
    assert not masked.causal


# -- slots of lanes ------------------------------------------------------------------------------------


@given(lanes=st.integers(1, 4), per_lane=st.integers(1, 5), count=st.integers(1, 6))
def test_draft_slots_of_lanes(lanes: int, per_lane: int, count: int) -> None:
    entries = [(3 * i) % per_lane for i in range(count)]
    found = lane_draft_slots(lanes, per_lane, torch.tensor(entries))
    assert found.tolist() == [[lane * per_lane + entry for entry in entries] for lane in range(lanes)]


@given(
    batch=st.integers(1, 2),
    lanes=st.integers(1, 3),
    count=st.integers(1, 3),
    per_lane=st.integers(1, 4),
    unused=st.integers(0, 3),
    data=st.data(),
)
def test_draft_tokens_see_nothing_of_other_lanes(
    batch: int, lanes: int, count: int, per_lane: int, unused: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, per_lane))
    total = lanes * per_lane + unused
    numbers = data.draw(st.integers(0, 2**31))
    visible = torch.rand(batch, lanes, count, size, generator=torch.Generator().manual_seed(numbers)) < 0.5
    wide = spread(visible, per_lane, total)
    assert wide.shape == (batch, lanes * count, total)
    for image in range(batch):
        for lane in range(lanes):
            for entry in range(count):
                expected = {lane * per_lane + i for i in range(size) if visible[image, lane, entry, i]}
                assert set(wide[image, lane * count + entry].nonzero()[:, 0].tolist()) == expected
