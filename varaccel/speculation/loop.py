"""The speculative loop: draft several tokens, verify them all in one pass, keep what the rule accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from varaccel.engine.canvas import Canvas
from varaccel.engine.counts import SpeculationStats
from varaccel.engine.distribution import Categorical
from varaccel.engine.randomness import GumbelNoise, Randomness, Stream
from varaccel.hosts.causal.cache_slots import lane_draft_slots, spread
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.causal.lanes import Fronts
from varaccel.hosts.causal.session import CausalSession, DraftInputs
from varaccel.speculation.batch import Batch, Start
from varaccel.speculation.rejection import Rule, VerificationResult, match
from varaccel.speculation.step import Draws, StepResult, Verifier
from varaccel.speculation.tree import DraftTree


def verify_by(rule: Rule) -> Verifier:
    """Verification by a rule that tests each draft token with a number of its own."""

    def verify(
        tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        return rule.verify(tree, distribution.probs, draws.verifying[:, : tree.tokens.shape[1]])

    return verify


def verify_by_matching(randomness: Randomness) -> Verifier:
    """Draw each token as plain decoding does, with the number of its position; accept draft tokens that equal it.

    The images are those of plain decoding with the same seed, token for token. For draft tokens that
    are not drawn by chance (a dynamic tree) no exact rule accepts more.
    """

    def verify(
        tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        numbers = randomness.at(positions.view(randomness.uniforms.shape[0], -1)).view(positions.shape)
        return match(tree, distribution.sample(numbers), distribution.logits)

    return verify


def verify_by_noise(noise: GumbelNoise) -> Verifier:
    """Draw each token with the Gumbel noise of its position; accept draft tokens that equal it.

    The image is a function of the seed alone: neither the drafter nor the tree changes it, only how many
    passes it takes. Draft tokens that were drawn with the same noise are accepted most often.

    Source: Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding"
    (arXiv 2408.07978).
    """

    def verify(
        tree: DraftTree, distribution: Categorical, draws: Draws, positions: Tensor
    ) -> VerificationResult:
        return match(tree, draw_by_noise(distribution, noise, positions), distribution.logits)

    return verify


def draw_by_noise(distribution: Categorical, noise: GumbelNoise, positions: Tensor) -> Tensor:
    """[M, T] token ids from distributions [M, T, V] with the noise of `positions` [M, T]."""
    here = noise.at(positions.view(len(noise.generators), -1)).view(distribution.logits.shape)
    return distribution.perturbed(here).argmax(dim=-1)


@torch.inference_mode()
def speculate(job: CausalJob, start: Start) -> SpeculationStats:
    """Fill the job's canvas by drafting and verifying. Every image, and every lane of it, has its own pace.

    The first pass of an image reads its condition and decides position 0 as plain decoding does. Every later pass
    reads, for each open lane, its last token and a tree of draft tokens; the rule walks down the tree and yields the
    distribution of one more token. So each pass decides at least one token per open lane.

    With more images than `job.batch_size`, the row of a finished image is given to the next, see `Batch`.

    The device is asked once per pass how far the images are.

    Args:
        start: opens sessions, proposer and verifier for some images of the job.
    """
    batch = Batch(job, start)
    while batch.advance():
        work, canvas = batch.work, batch.canvas
        fronts = work.lanes.fronts(canvas, batch.steps, fixed=work.session.static_shapes)
        most = work.lanes.most_open(canvas.num_positions)
        draws = _draws(batch.stream, most, fronts.start.shape[1], work.proposer.nodes)
        roots = canvas.tokens.gather(1, fronts.source.clamp(min=0))
        tree = work.proposer.propose(roots, fronts, draws)
        outcome = _verify_step(work.session, canvas, fronts, tree, work.verify, draws)
        work.proposer.observe(outcome, draws)
        batch.write(outcome)
    return batch.stats


def _draws(stream: Stream, most: int, lanes: int, nodes: int) -> Draws:
    numbers = stream.next()  # [B, ...]
    # the number of lanes read depends on the batch; the numbers that a lane gets must not
    numbers = numbers.view(numbers.shape[0], most, -1)[:, :lanes].flatten(0, 1)
    verifying, extra, drafting = numbers.split([nodes, 1, numbers.shape[1] - nodes - 1], dim=1)
    return Draws(verifying, extra, drafting)


def _verify_step(
    session: CausalSession, canvas: Canvas, fronts: Fronts, tree: DraftTree, verify: Verifier, draws: Draws
) -> StepResult:
    batch, lanes = fronts.start.shape
    nodes = tree.tokens.shape[1]
    start, limit, end = (x.reshape(-1, 1) for x in (fronts.start, fronts.limit, fronts.end))
    depths = tree.depths
    # node of depth d stands for position start - 1 + d; what lies beyond the lane does not exist
    inside = (start >= 0) & (depths >= 0) & (depths <= end)
    stands = torch.where(inside, start - 1 + depths, -1)  # [M, T]
    features = _read(session, canvas, fronts, tree, stands)  # [R, A * T, dim]
    predicted = torch.where(inside, (stands + 1).clamp(max=canvas.num_positions - 1), 0)
    predicted = predicted.view(batch, lanes * nodes)
    distribution = session.distribution(features, predicted).by_lane(lanes)
    result = verify(tree, distribution, draws, predicted.view(stands.shape))
    extra = Categorical(result.probs.log().unsqueeze(1)).sample(draws.extra)  # [M, 1]
    committed = torch.minimum(result.length + 1, limit.squeeze(1))  # 0 where the lane is closed
    path = result.nodes  # [M, D + 1]
    index = torch.arange(path.shape[1], device=path.device)
    below = torch.cat([path[:, 1:], torch.full_like(path[:, :1], -1)], dim=1)
    tokens = torch.where(index < result.length.unsqueeze(1), tree.tokens.gather(1, below.clamp(min=0)), extra)
    positions = torch.where(index < committed.unsqueeze(1), start + index, -1)
    if nodes > 1:
        accepted = index < torch.minimum(result.length, committed).unsqueeze(1)
        first = torch.arange(lanes, device=path.device).repeat(batch).unsqueeze(1) * (nodes - 1)
        session.cache_slots.keep(
            (first + below.clamp(min=1) - 1).view(batch, -1),
            torch.where(accepted, start + index, -1).view(batch, -1),
        )
    return StepResult(
        fronts=fronts,
        tree=tree,
        distribution=distribution,
        features=features.unflatten(1, (lanes, nodes)),
        path=path,
        committed=committed,
        tokens=tokens,
        positions=positions,
    )


def _read(session: CausalSession, canvas: Canvas, fronts: Fronts, tree: DraftTree, stands: Tensor) -> Tensor:
    """Features [R, A * T, dim] at all nodes, from one pass over late tokens, roots and draft tokens."""
    batch, lanes = fronts.start.shape
    nodes = tree.tokens.shape[1]
    drafts = nodes - 1
    device = stands.device
    # the root is read in the slot of its position, node i of a lane in draft slot i - 1 of that lane
    entries = torch.arange(-1, drafts, device=device)
    draft_slots = (
        torch.where(entries >= 0, lane_draft_slots(lanes, drafts, entries), -1).flatten().expand(batch, -1)
    )
    sees = tree.ancestors.view(batch, lanes, nodes, nodes)[..., 1:]  # [B, A, T, T - 1]
    visible = spread(sees, drafts, session.cache_slots.draft_slots)
    tokens = tree.tokens.view(batch, -1)
    positions = stands.view(batch, -1)
    late = fronts.refresh is not None
    if fronts.refresh is not None:  # a true last token takes the place of the stand-in that was read for it
        refresh = fronts.refresh.unsqueeze(1)
        tokens = torch.cat([canvas.tokens.gather(1, refresh.clamp(min=0)), tokens], dim=1)
        positions = torch.cat([refresh, positions], dim=1)
        draft_slots = torch.cat([torch.full_like(refresh, -1), draft_slots], dim=1)
        visible = torch.cat([torch.zeros_like(visible[:, :1]), visible], dim=1)
    features = session.read(DraftInputs(tokens, positions, draft_slots, visible), fronts.start)
    return features[:, 1:] if late else features
