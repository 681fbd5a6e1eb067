"""Plans of what each scale costs: limit cases are plain decoding, every option does what it says."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.tiny import CLASSES, PROMPTS, multiscale_vq, text_encoder, var_transformer
from varaccel import CoDe, FastVAR, Plain, ScalePlan, SkipVAR, VARPipeline
from varaccel.accelerators import AnyAccelerator, make_accelerator
from varaccel.accelerators.notation import parse_accelerator
from varaccel.engine.canvas import Canvas
from varaccel.engine.job import Job
from varaccel.errors import InputError
from varaccel.hosts.next_scale.feature_map import FeatureMap
from varaccel.hosts.next_scale.growing_cache import GrowingCache
from varaccel.hosts.next_scale.plan import Pruning, SessionPlan
from varaccel.hosts.next_scale.sampling import ScaleGuidance
from varaccel.hosts.next_scale.schedule import Scales
from varaccel.hosts.next_scale.session import ScaleSession
from varaccel.hosts.next_scale.skipping import high_frequency_share
from varaccel.nn.condition import Condition
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.tokenizers.text import WordTokenizer

SIDES = (1, 2, 3, 4, 5)
SCHEDULE = ScaleSchedule(SIDES)
SCALES, BORDERS, TOKENS = len(SIDES), SCHEDULE.borders, SCHEDULE.num_tokens
DEPTH, SIZE = 3, 2 * SIDES[-1]
FILTERED = {"guidance_scale": 3.0, "top_k": 12, "top_p": 0.9}
UNGUIDED = {"guidance_scale": 1.0}


@cache
def pipeline(condition: str = "class") -> VARPipeline:
    """A pipeline with five scales and a refiner; shared by tests, so nobody may change it."""
    words = WordTokenizer.from_words(("a", "red", "blue", "sphere", "cube", "left", "of"), max_length=8)
    text = (text_encoder(words), words) if condition == "caption" else (None, None)
    pipe = VARPipeline(
        var_transformer(condition, scales=SIDES, depth=DEPTH),
        multiscale_vq(scales=SIDES),
        *text,
        refiner=var_transformer(condition, seed=1, depth=2, scales=SIDES),
        class_names=CLASSES if condition == "class" else None,
        guidance_scale=3.0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(accelerator: AnyAccelerator | str | None = None, prompt: Any = None, **options: Any) -> Any:
    prompt = PROMPTS["c2i"] if prompt is None else prompt
    return pipeline()(
        prompt, accelerator=accelerator, **{"seed": 3, "output_type": "latent", **FILTERED, **options}
    )


def token_ids(accelerator: AnyAccelerator | str | None = None, prompt: Any = None, **options: Any) -> Tensor:
    return drawn(accelerator, prompt, **options).images


PLAIN = [
    ScalePlan(),
    ScalePlan(keep={-1: 1.0, 2: 1}),
    ScalePlan(stop=SCALES, guided_scales=SCALES, draft_scales=SCALES),
    ScalePlan(cache={0: 1, 1: (1, 1, 1)}, together=1),
    FastVAR(keep=(1.0, 1.0), skip_scales=0),
    SkipVAR(stop_below=0, unguided_below=0),
    SkipVAR(decision_scales=SCALES),
]
"""Plans that leave nothing out."""

PLANS = {
    "refiner": ScalePlan(draft_scales=-2),
    "unguided": ScalePlan(guided_scales=3),
    "never guided": ScalePlan(guided_scales=0),
    "pruned": ScalePlan(keep={-2: 0.6, -1: 0.5}),
    "pruned, some blocks": ScalePlan(keep={-1: 0.3}, cached_scale=1, blocks=(1, -1), parts=("ffn",)),
    "pruned by attention": ScalePlan(keep={3: 0.5, 4: 0.25}, criterion="attention"),
    "stop": ScalePlan(stop=-2),
    "smaller cache": ScalePlan(cache={2: 0.5, 3: (1, 0.5, 0.1)}),
    "smaller cache by attention": ScalePlan(cache={1: 0.5, 3: 0.3}, criterion="attention"),
    "together": ScalePlan(together=2),
    "all together": ScalePlan(together=SCALES),
    "several": ScalePlan(guided_scales=3, keep={3: 0.5}, cache={1: 0.5, 2: 0.5}, stop=4),
    "refiner, pruned": ScalePlan(draft_scales=2, keep={4: 0.5}, guided_scales=4, cache={1: 0.5, 3: 0.5}),
    "model, pruned": ScalePlan(draft_scales=4, keep={3: 0.5}, stop=SCALES),
    "cache, together": ScalePlan(cache={1: 0.5, 2: (0.5, 1, 0.1)}, together=2, guided_scales=2),
    "pruned, together": ScalePlan(keep={2: 0.5}, together=2),
    "refiner, together": ScalePlan(draft_scales=3, together=2, stop=SCALES),
    "fast_var": FastVAR(),
    "fast_var, skipping": FastVAR(keep=(0.6, 0.5), skip_scales=1),
    "skip_var": SkipVAR(decision_scales=4, stop_below=0.3, unguided_below=0.6),
}
every_plan = pytest.mark.parametrize("name", PLANS)


@pytest.mark.parametrize("accelerator", PLAIN, ids=repr)
@pytest.mark.parametrize("options", [FILTERED, UNGUIDED], ids=["guided, filtered", "unguided"])
def test_leaving_nothing_out_is_plain_decoding(accelerator: AnyAccelerator, options: dict[str, Any]) -> None:
    for prompt in (PROMPTS["c2i"], PROMPTS["c2i"][:1]):
        out = drawn(accelerator, prompt, **options)
        assert torch.equal(out.images, token_ids(None, prompt, **options))
        assert out.stats.label == "plain()"
        assert out.stats.lossless


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, FILTERED) for name in PLANS),
        *((name, UNGUIDED) for name in ("several", "together", "skip_var")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"guidance {value['guidance_scale']}",
)
def test_images_do_not_depend_on_their_batch(name: str, options: dict[str, Any]) -> None:
    state, before = torch.get_rng_state(), weights()
    together = drawn(PLANS[name], **options)
    assert torch.equal(together.images, token_ids(PLANS[name], **options))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
    assert (together.written > 0).all()
    assert together.stats.lossless == (together.stats.label == "plain()")
    for index, prompt in enumerate(PROMPTS["c2i"]):
        alone = token_ids(PLANS[name], prompt, **options | {"seed": 3 + index})
        assert torch.equal(alone[0], together.images[index])
    parts = token_ids(PLANS[name], batch_size=2, **options)
    assert torch.equal(parts, together.images)


def weights() -> list[Tensor]:
    networks: list[nn.Module] = [pipeline().transformer, pipeline().refiner, pipeline().vq_model]
    return [tensor.clone() for network in networks for tensor in network.state_dict().values()]


@every_plan
def test_plans_matter(name: str) -> None:
    assert not torch.equal(token_ids(PLANS[name]), token_ids()), "else the tests prove nothing"


@every_plan
def test_images_are_what_the_tokens_say(name: str) -> None:
    tokens, pixels = token_ids(PLANS[name]), token_ids(PLANS[name], output_type="pt")
    with torch.no_grad():
        expected = pipeline().vq_model.decode_tokens(tokens).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@every_plan
def test_previews_change_nothing(name: str) -> None:
    shown: list[Tensor] = []

    def look(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        shown.append(state["preview"]())

    images = token_ids(PLANS[name], output_type="pt", callback_on_step_end=look)
    assert torch.equal(images, token_ids(PLANS[name], output_type="pt"))
    assert torch.equal(shown[-1], images)


@pytest.mark.parametrize("name", ["pruned", "several", "refiner, pruned", "together", "skip_var"])
def test_other_numbers_and_networks(name: str) -> None:
    """Half-precision caches, softened code vectors, captions, and compiled networks."""
    exact = token_ids(PLANS[name])
    half = drawn(PLANS[name], cache_dtype=torch.bfloat16)
    assert half.images.shape == exact.shape
    full = drawn(PLANS[name]).stats.cache_bytes
    assert half.stats.cache_bytes * 2 == full > 0
    smooth = token_ids(PLANS[name], smooth=True)
    assert torch.equal(smooth[:, :1], exact[:, :1])
    assert torch.equal(smooth[1:2], token_ids(PLANS[name], PROMPTS["c2i"][1], smooth=True, seed=4))
    prompts = PROMPTS["t2i"]
    captions = pipeline("caption")(prompts, seed=3, accelerator=PLANS[name], output_type="latent").images
    alone = pipeline("caption")(prompts[2], seed=5, accelerator=PLANS[name], output_type="latent").images
    assert torch.equal(captions[2:], alone)


@pytest.mark.slow
def test_compiled_networks_draw_the_same() -> None:
    pipe = VARPipeline(
        pipeline().transformer, pipeline().vq_model, refiner=pipeline().refiner, class_names=CLASSES
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.compile(backend="eager")
    for name in ("unguided", "pruned"):
        options = {"seed": 3, "output_type": "latent", "accelerator": PLANS[name], **FILTERED}
        assert torch.equal(pipe(PROMPTS["c2i"], **options).images, token_ids(PLANS[name]))


# -- the network's own word ----------------------------------------------------------------------------

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}


def greedy_tokens(inputs: Tensor) -> Tensor:
    """What is most likely of all tokens in one pass over what they see, unguided, [B, L]."""
    pipe = pipeline()
    with torch.no_grad():
        return pipe.transformer(pipe._labels(PROMPTS["c2i"]), inputs).argmax(-1)


def test_unguided_scales_follow_the_conditional_distribution() -> None:
    tokens, guided = token_ids(ScalePlan(guided_scales=3), **GREEDY), token_ids(**GREEDY)
    border = BORDERS[3]
    assert torch.equal(tokens[:, :border], guided[:, :border])
    expected = greedy_tokens(pipeline().vq_model.quantize.inputs(tokens))
    assert torch.equal(tokens[:, border:], expected[:, border:])
    assert torch.equal(token_ids(ScalePlan(guided_scales=0), **GREEDY), token_ids(**GREEDY, guidance_scale=1))


def test_scales_together_see_the_map_before_them() -> None:
    for joint in (2, 3, SCALES):
        tokens = token_ids(ScalePlan(together=joint), **GREEDY | UNGUIDED)
        first = SCALES - joint
        quantizer = pipeline().vq_model.quantize
        before = quantizer.feature_maps(tokens, first)[-1] if first else quantizer.start(3)
        own = [quantizer.look(before, scale) for scale in range(max(1, first + 1), SCALES)]
        seen = quantizer.inputs(tokens)[:, : max(BORDERS[first + 1] - 1, 0)]
        assert torch.equal(tokens, greedy_tokens(torch.cat([seen, *own], 1)))


def test_scales_together_are_one_pass() -> None:
    assert drawn(ScalePlan(together=3)).stats.passes == SCALES - 2
    assert drawn(ScalePlan(stop=4, together=2)).stats.passes == 3
    assert drawn(ScalePlan(draft_scales=2, together=3)).stats.passes == 3
    assert [stage.passes for stage in drawn(ScalePlan(draft_scales=2, together=3)).stats.stages] == [2, 1]


def test_stopping() -> None:
    out, plain = drawn(ScalePlan(stop=3)), token_ids()
    assert torch.equal(out.images[:, : BORDERS[3]], plain[:, : BORDERS[3]])
    assert (out.images[:, BORDERS[3] :] == -1).all()
    assert out.stats.passes == 3
    assert out.stats.tokens == BORDERS[3]
    assert not out.stats.interrupted
    pixels = token_ids(ScalePlan(stop=3), output_type="pt")
    with torch.no_grad():
        shown = pipeline().vq_model.decode(pipeline().vq_model.quantize.feature_maps(plain)[2])
    torch.testing.assert_close(pixels, shown.clamp(-1, 1) / 2 + 0.5, atol=1e-5, rtol=0)


def test_stopping_draws_no_numbers() -> None:
    """The published stream of a call with fewer scales is a prefix of the whole one."""
    plain, stopped = (token_ids(plan, published_rng=True) for plan in (None, ScalePlan(stop=3)))
    assert torch.equal(stopped[:, : BORDERS[3]], plain[:, : BORDERS[3]])


@pytest.mark.parametrize("draft_scales", range(1, SCALES))
def test_a_hand_over_is_that_of_code(draft_scales: int) -> None:
    ours, code = drawn(ScalePlan(draft_scales=draft_scales)), drawn(CoDe(draft_scales=draft_scales))
    assert torch.equal(ours.images, code.images)
    kept = [dataclasses.replace(stage, seconds=0) for stage in code.stats.stages]
    assert [dataclasses.replace(stage, seconds=0) for stage in ours.stats.stages] == kept
    assert ours.stats.passes == code.stats.passes == SCALES


# -- pruning -------------------------------------------------------------------------------------------


def session_of(plan: SessionPlan, guidance: float = 3.0, **options: Any) -> tuple[ScaleSession, Canvas]:
    """A session over the tokens of plain decoding."""
    tokens = token_ids()
    canvas = Canvas(tokens, torch.ones_like(tokens, dtype=torch.int32))
    given = Condition(torch.tensor([0, 1, 4]))
    features = FeatureMap(pipeline().vq_model.quantize, 3)
    session = ScaleSession(
        pipeline().transformer, features, given, guidance=ScaleGuidance(guidance), plan=plan, **options
    )
    return session, canvas


def test_keeping_all_tokens_of_a_pruned_scale_changes_nothing() -> None:
    """Through the pruned path: tokens are only read in another order."""
    for criterion in ("distance", "attention"):
        pruned, canvas = session_of(SessionPlan(pruning=Pruning({3: 1.0, 4: 1.0}, 2, criterion=criterion)))  # type: ignore[arg-type]
        plain, _ = session_of(SessionPlan())
        for scale in range(SCALES):
            torch.testing.assert_close(
                pruned.logits(canvas, scale), plain.logits(canvas, scale), atol=1e-4, rtol=1e-4
            )


def test_only_kept_tokens_enter_the_cache() -> None:
    pruning = Pruning({3: 0.5}, 2, blocks=(1, 2))
    session, canvas = session_of(SessionPlan(pruning=pruning))
    for scale in range(4):
        session.logits(canvas, scale)
    assert isinstance(session.cache, GrowingCache)
    assert [session.cache.length(layer) for layer in range(DEPTH)] == [30, 22, 30]
    session.logits(canvas, 4)
    assert session.reads == SCALES


def test_rows_choose_their_own_tokens() -> None:
    """An image's pruned logits are those of it alone, and of the unconditional row, too."""
    plan = SessionPlan(pruning=Pruning({3: 0.5, 4: 0.3}, 2), cache={1: 0.5})
    session, canvas = session_of(plan)
    together = [session.logits(canvas, scale) for scale in range(SCALES)]
    alone = ScaleSession(
        pipeline().transformer,
        FeatureMap(pipeline().vq_model.quantize, 1),
        Condition(torch.tensor([1])),
        guidance=ScaleGuidance(3.0),
        plan=plan,
    )
    for scale in range(SCALES):
        one = alone.logits(canvas.part(slice(1, 2)), scale)
        torch.testing.assert_close(one, together[scale][1:2], atol=1e-4, rtol=1e-4)


def test_pruned_tokens_get_what_the_cached_scale_added() -> None:
    """With feed-forward layers alone pruned and a block of one: by hand, from the layer itself."""
    pipe, seen = pipeline(), {}
    block: Any = pipe.transformer.blocks[1]
    update = block.ffn.forward

    def noted(x: Tensor) -> Tensor:
        seen.setdefault("inputs", []).append(x.shape[1])
        return update(x)

    session, canvas = session_of(
        SessionPlan(pruning=Pruning({4: 0.2}, 2, blocks=(1, 2), parts=("ffn",))), guidance=1.0
    )
    block.ffn.forward = noted
    try:
        logits = [session.logits(canvas, scale) for scale in range(SCALES)]
    finally:
        del block.ffn.forward
    assert seen["inputs"] == [1, 4, 9, 16, 5]
    plain, _ = session_of(SessionPlan(), guidance=1.0)
    exact = [plain.logits(canvas, scale) for scale in range(SCALES)]
    assert all(torch.equal(a, b) for a, b in zip(logits[:4], exact[:4], strict=True))
    assert not torch.allclose(logits[4], exact[4], atol=1e-2)


# -- memory --------------------------------------------------------------------------------------------


def test_what_smaller_caches_save() -> None:
    slot = 2 * 4 * 32  # keys and values of 4 bytes and 32 channels, of a row and layer
    plain = drawn().stats.cache_bytes
    assert plain == slot * 6 * DEPTH * BORDERS[4]
    assert drawn(ScalePlan(guided_scales=2)).stats.cache_bytes == slot * 3 * DEPTH * BORDERS[4]
    halved = drawn(ScalePlan(cache={3: 0.5})).stats.cache_bytes
    assert halved == slot * 6 * DEPTH * (BORDERS[3] + 8)
    by_layer = drawn(ScalePlan(cache={3: (1, 0.5, 0.25)})).stats.cache_bytes
    assert by_layer == slot * 6 * (DEPTH * BORDERS[3] + 16 + 8 + 4)
    assert drawn(ScalePlan(stop=3)).stats.cache_bytes == slot * 6 * DEPTH * BORDERS[2]
    assert drawn(ScalePlan(together=2)).stats.cache_bytes == slot * 6 * DEPTH * BORDERS[3]


# -- images that end early -----------------------------------------------------------------------------


def test_each_image_decides_for_itself() -> None:
    """One ends, one goes on unguided, one as it is: each as if all had been told so."""
    plain = token_ids()
    # of a map of 3 x 3 all frequencies are high, so the scale before the last decides
    seen = pipeline().vq_model.quantize.look(pipeline().vq_model.quantize.feature_maps(plain, 4)[-1], 3)
    shares = high_frequency_share(seen.detach(), (4, 4))
    least, middle, most = shares.argsort().tolist()
    stop_below = float(shares[least] + shares[middle]) / 2
    unguided_below = float(shares[middle] + shares[most]) / 2
    accelerator = SkipVAR(decision_scales=4, stop_below=stop_below, unguided_below=unguided_below)
    out = drawn(accelerator)
    assert torch.equal(out.images[least], token_ids(ScalePlan(stop=4))[least])
    assert torch.equal(out.images[middle], token_ids(ScalePlan(guided_scales=4))[middle])
    assert torch.equal(out.images[most], plain[most])
    assert not torch.equal(out.images[middle], plain[middle])
    assert (out.written > 0).all()
    assert out.stats.passes == SCALES
    all_end = drawn(SkipVAR(decision_scales=4, stop_below=1.0))
    assert torch.equal(all_end.images, token_ids(ScalePlan(stop=4)))
    assert all_end.stats.passes == 4
    assert torch.equal(
        token_ids(SkipVAR(decision_scales=4, stop_below=0, unguided_below=1.0)),
        token_ids(ScalePlan(guided_scales=4)),
    )
    assert torch.equal(token_ids(accelerator, **UNGUIDED)[most], token_ids(**UNGUIDED)[most])


# -- painting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stop", "pruned", "together", "several", "skip_var", "refiner, pruned"])
@pytest.mark.parametrize("prompt", [None, 1], ids=["without a prompt", "prompted"])
def test_inpainting_keeps_given_tokens(name: str, prompt: int | None) -> None:
    """Also those of scales that are left out."""
    pixels = torch.randint(256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0))
    source = Image.fromarray(pixels.to(torch.uint8).numpy())
    mask = torch.zeros(SIZE, SIZE)
    mask[:, SIZE // 2 :] = 1
    options = {"num_images": 2, "seed": 1, "output_type": "latent"}
    plain = pipeline().inpaint(source, mask, prompt, **options).images
    out = pipeline().inpaint(source, mask, prompt, accelerator=PLANS[name], **options)
    given = (plain[0] == plain[1]) & (plain == pipeline().vq_model.encode(_image(source)).indices).all(0)
    kept = given & (out.images != -1).all(0)
    assert torch.equal(out.images[:, kept], plain[:, kept])
    assert kept[BORDERS[-2] :].any(), "tokens of the last scale are given"
    assert (out.written > 0).all()
    decoded = pipeline().vq_model.decode_tokens(out.images).clamp(-1, 1) / 2 + 0.5
    shown = pipeline().inpaint(
        source, mask, prompt, accelerator=PLANS[name], **options | {"output_type": "pt"}
    )
    torch.testing.assert_close(shown.images, decoded, atol=1e-5, rtol=0)


def _image(source: Image.Image) -> Tensor:
    from varaccel.pipelines.inpainting import image_tensor

    return image_tensor(source, (SIZE, SIZE))


# -- options -------------------------------------------------------------------------------------------


def test_options_as_text() -> None:
    typed = parse_accelerator(
        'scale_plan:keep={"-2": 0.6, "-1": 0.5},blocks=[1, null],cache=[[1, 0.5]],stop=-1'
    )
    assert typed == ScalePlan(keep={-2: 0.6, -1: 0.5}, blocks=(1, None), cache={1: 0.5}, stop=-1)
    assert typed == make_accelerator("scale_plan", typed.options())
    assert hash(typed) == hash(make_accelerator("scale_plan", typed.options()))
    assert parse_accelerator("fast_var:keep=[0.5],skip_scales=1") == FastVAR(keep=(0.5,), skip_scales=1)


def test_negative_numbers_count_from_the_end() -> None:
    for ours, same in (
        (ScalePlan(stop=-1), ScalePlan(stop=4)),
        (ScalePlan(guided_scales=-2), ScalePlan(guided_scales=3)),
        (ScalePlan(draft_scales=-2), ScalePlan(draft_scales=3)),
        (ScalePlan(keep={-1: 0.5}, cached_scale=-3), ScalePlan(keep={4: 0.5}, cached_scale=2)),
        (ScalePlan(cache={-2: 0.5}), ScalePlan(cache={3: 0.5})),
        (SkipVAR(decision_scales=-2), SkipVAR(decision_scales=3)),
    ):
        assert torch.equal(token_ids(ours), token_ids(same))


def test_fast_var_is_a_plan() -> None:
    same = ScalePlan(keep={-2: 0.6, -1: 0.5}, blocks=(0, 3))
    assert torch.equal(token_ids(FastVAR()), token_ids(same))
    small = ScalePlan(keep={-2: 0.5}, stop=-1, blocks=(0, 3))
    assert torch.equal(token_ids(FastVAR(keep=(0.5,), skip_scales=1)), token_ids(small))

    class Published:
        num_scales, network = 13, type("Network", (), {"blocks": range(32)})

    job: Any = Published
    assert FastVAR().scale_plan(job) == ScalePlan(keep={9: 0.6, 10: 0.5}, blocks=(3, 28), stop=11)


def refused(message: str) -> Any:
    return pytest.raises(InputError, match=rf"^(?=[^\n]*{message})[^\n]+\.\Z")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": {-1: 0}}, "keep must be above 0"),
        ({"keep": {-1: 1.5}}, "keep must be a number from 0 to 1"),
        ({"keep": 0.5}, "keep gives scales and their values"),
        ({"keep": {"x": 0.5}}, "a scale of keep must be an integer"),
        ({"cache": {0: 0}}, "cache must be above 0"),
        ({"cache": {0: [1, "x", 1]}}, "cache must be a number"),
        ({"stop": 1.5}, "stop must be an integer"),
        ({"blocks": 3}, "blocks must be the first block and the end"),
        ({"parts": ()}, "parts must name one sub-layer"),
        ({"parts": "heads"}, "heads"),
        ({"criterion": "entropie"}, "distance"),
        ({"together": 0}, "together must be an integer of at least 1"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with refused(message):
        ScalePlan(**options)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ScalePlan(keep={5: 0.5}), "keep names scale 5, but the model has 5 scales"),
        (ScalePlan(keep={-6: 0.5}), "keep names scale -6"),
        (ScalePlan(cache={7: 0.5}), "cache names scale 7, but"),
        (ScalePlan(stop=0), "stop must be from 1"),
        (ScalePlan(stop=-5), "stop must be from 1"),
        (ScalePlan(guided_scales=6), "guided_scales must be from 0"),
        (ScalePlan(draft_scales=6), "draft_scales must be from 1"),
        (ScalePlan(stop=3, keep={3: 0.5}), "only the first 3 scales are decided"),
        (ScalePlan(together=2, keep={3: 0.5}), "those from 3 on are decided together"),
        (ScalePlan(together=4, stop=3), "together=4 scales in one pass, but 3 are decided"),
        (ScalePlan(together=2, guided_scales=4), "decided together, guided or not"),
        (ScalePlan(together=2, draft_scales=4), "one network must draw them"),
        (ScalePlan(keep={0: 0.5}), "needs a cached scale before it"),
        (ScalePlan(keep={3: 0.5}, cached_scale=3), "needs a cached scale before it"),
        (ScalePlan(keep={3: 0.5}, draft_scales=2), "must all come before that one, or all after it"),
        (ScalePlan(keep={3: 0.5}, blocks=(3, None)), "names none of the model's 3 blocks"),
        (ScalePlan(cache={4: 0.5}), "no later pass looks at its keys"),
        (ScalePlan(cache={3: 0.5}, together=2), "no later pass looks at its keys"),
        (ScalePlan(cache={2: (1, 0.5)}), "2 shares for scale 2, but the model has 3 layers"),
        (ScalePlan(cache={2: (1, 1, 0.5)}, draft_scales=1), "but the model has 2 layers"),
        (ScalePlan(cache={1: 0.5}, draft_scales=2, criterion="attention"), "use criterion='distance'"),
        (FastVAR(skip_scales=5), "skip_scales must be less than the model's 5 scales"),
        (SkipVAR(decision_scales=9), "decision_scales must be from 1"),
    ],
    ids=str,
)
def test_plans_that_make_no_sense(plan: AnyAccelerator, message: str) -> None:
    with refused(message):
        drawn(plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastVAR(keep=()), "keep must have one share"),
        (lambda: FastVAR(keep=(0.5, 0)), "keep must be above 0"),
        (lambda: FastVAR(skip_scales=-1), "skip_scales"),
        (lambda: SkipVAR(stop_below=2), "stop_below"),
        (lambda: SkipVAR(decision_scales="x"), "decision_scales must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_of_named_plans(make: Any, message: str) -> None:
    with refused(message):
        make()


def test_a_job_without_scales() -> None:
    assert issubclass(ScalePlan.job_type, Job)
    assert Plain().lossless
    assert [inputs.scale for inputs in Scales(SCHEDULE, 2).step_inputs(Canvas.empty(1, TOKENS))] == [0, 1]
