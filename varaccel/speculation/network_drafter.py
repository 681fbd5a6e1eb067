"""Drafting with a network of the same kind as the target: a smaller model, or some layers of the target itself."""

from __future__ import annotations

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.distribution import Categorical
from varaccel.errors import InputError
from varaccel.hosts.causal.cache_slots import lane_draft_slots, spread
from varaccel.hosts.causal.lanes import Fronts
from varaccel.hosts.causal.network import LayeredNetwork
from varaccel.hosts.causal.session import CausalSession, DraftInputs
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache
from varaccel.speculation.proposers import Branch
from varaccel.speculation.step import StepResult


class LayerSubset:
    """Some layers of a network as a network of its own, on the same weights.

    Args:
        network: that can be run with some of its layers.
        layers: numbers of the layers that are run, in order.

    Raises:
        InputError: layers that the network does not have, none, or one named twice.
    """

    def __init__(self, network: LayeredNetwork, layers: tuple[int, ...]) -> None:
        depth = network.num_layers
        if not layers or any(not 0 <= i < depth for i in layers) or len(set(layers)) < len(layers):
            raise InputError(f"layers must be different numbers from 0 to {depth - 1}, got {list(layers)}.")
        self.network, self.layers = network, layers
        self.signature, self.parameters = network.signature, network.parameters
        self.encode_condition, self.embed_tokens = network.encode_condition, network.embed_tokens
        self.logits, self.possible_tokens = network.logits, network.possible_tokens

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        return self.network.transform(x, attention, self.layers)

    def new_cache(self, rows: int, slots: int) -> KVCache:
        return self.network.new_cache(rows, slots, self.layers)


class NetworkReader:
    """A draft network at work: reads the canvas and draft tokens in a session of its own.

    What was decided in the last pass is read anew from the canvas, whether or not the draft tokens were accepted: that
    is one pass with a few more tokens, and the cache needs no repair.

    Args:
        session: of the draft network, with `draft_slots` entries for every lane.
        canvas: of the call.
        depth: most tokens of a lane that a pass decides, less one.
        draft_slots: of every lane.
    """

    def __init__(self, session: CausalSession, canvas: Canvas, depth: int, draft_slots: int) -> None:
        self.session, self.canvas, self.depth, self.draft_slots = session, canvas, depth, draft_slots
        self._fronts: Fronts | None = None

    @property
    def passes(self) -> int:
        return self.session.reads

    def begin(self, roots: Tensor, fronts: Fronts) -> Categorical:
        self._fronts = fronts
        lanes = roots.shape[1]
        back = torch.arange(-self.depth, 1, device=roots.device)
        ends = torch.where(fronts.open, fronts.start - 1, -1)
        if fronts.refresh is not None:  # the end of a lane that was finished
            ends = torch.cat([fronts.refresh.unsqueeze(1), ends], dim=1)
        positions = ends.unsqueeze(-1) + back  # [B, A, K] or [B, 1 + A, K]
        index = positions.clamp(min=0).flatten(1)
        decided = (self.canvas.written.gather(1, index) > 0).view(positions.shape)
        tokens = self.canvas.tokens.gather(1, index).view(positions.shape).clone()
        tokens[:, -lanes:, -1] = roots  # which may be stand-ins
        decided[:, -lanes:, -1] = True
        used = decided & (positions >= 0) & (ends >= 0).unsqueeze(-1)
        positions = torch.where(used, positions, -1)
        features = self._read(tokens.flatten(1), positions.flatten(1))
        features = features.view(features.shape[0], -1, len(back), features.shape[-1])[:, -lanes:, -1]
        return self._distribution(features, fronts.start.clamp(min=0), lanes)

    def extend(self, branch: Branch) -> Categorical:
        assert self._fronts is not None
        batch, lanes, count = branch.tokens.shape
        positions = draft_positions(self._fronts, branch)
        entries = branch.first + torch.arange(count, device=positions.device)
        draft_slots = lane_draft_slots(lanes, self.draft_slots, entries).flatten().expand(batch, -1)
        visible = spread(branch.visible, self.draft_slots, self.session.cache_slots.draft_slots)
        features = self._read(branch.tokens.flatten(1), positions.flatten(1), draft_slots, visible)
        return self._distribution(features, (positions + 1).flatten(1), lanes)

    def observe(self, outcome: StepResult) -> None:
        pass

    def put_rows(self, rows: Tensor, other: NetworkReader) -> None:
        self.session.put_rows(rows, other.session)

    def keep_rows(self, rows: Tensor) -> None:
        self.session.keep_rows(rows)

    def _read(
        self,
        tokens: Tensor,
        positions: Tensor,
        draft_slots: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        assert self._fronts is not None
        return self.session.read(DraftInputs(tokens, positions, draft_slots, visible), self._fronts.start)

    def _distribution(self, features: Tensor, positions: Tensor, lanes: int) -> Categorical:
        return self.session.distribution(features, positions).by_lane(lanes)


def draft_positions(fronts: Fronts, branch: Branch) -> Tensor:
    """[B, A, n] positions that the draft tokens of a branch stand for, -1 beyond the end of the lane."""
    inside = fronts.open & (branch.depth <= fronts.end)
    positions = torch.where(inside, fronts.start - 1 + branch.depth, -1)
    return positions.unsqueeze(-1).expand_as(branch.tokens)
