"""The VAR pipeline as a user calls it: published runs, collaborative decoding, editing, inputs good and bad."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn

from tests.models.test_var_parity import CODE, GENERATION, GOLDEN, TOLERANCES, TRANSFORMERS, close, tensors
from tests.models.test_var_parity import network as golden_network
from tests.models.test_var_parity import token_ids as recorded
from tests.models.test_var_parity import tokenizer as golden_tokenizer
from tests.tiny import (
    CLASSES,
    PROMPTS,
    SCALES,
    VOCAB_SIZE,
    multiscale_vq,
    new_pipeline,
    pipeline,
    var_transformer,
)
from varaccel import AutoPipeline, CoDe, VARPipeline
from varaccel.accelerators import ACCELERATORS, Accelerator, fitting
from varaccel.accelerators.plain import Plain
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.image_inputs import rgb_image
from varaccel.nn.scale_schedule import SCALES_256, ScaleSchedule
from varaccel.pipelines.inpainting import checked_mask, image_tensor, kept_tokens, mask_tensor, placed

HOSTS = ("var-class", "var-caption")
SCHEDULE = ScaleSchedule(SCALES)
BORDERS, TOKENS = SCHEDULE.borders, SCHEDULE.num_tokens
SIZE = 2 * SCHEDULE.last_side
"""Height and width of the tiny images."""

on_hosts = pytest.mark.parametrize("host", HOSTS)


def token_ids(host: str, prompt: Any = None, **options: Any) -> Tensor:
    prompt = PROMPTS[host] if prompt is None else prompt
    return pipeline(host)(prompt, output_type="latent", **{"seed": 3, **options}).images


def with_itself(host: str, draft_scales: int, **options: Any) -> CoDe:
    """CoDe whose refiner is the model itself, so that only the hand-over is new."""
    return CoDe(refiner=pipeline(host).transformer, draft_scales=draft_scales, **options)


# -- published runs ------------------------------------------------------------------------------------


@cache
def golden_pipeline(name: str) -> VARPipeline:
    pipe = VARPipeline.from_single_file(
        GOLDEN / TRANSFORMERS[name]["weights"], vq_model=golden_tokenizer(TRANSFORMERS[name]["tokenizer"])
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def repeats(
    name: str, run: str, labels: list[int], options: dict[str, Any], golden: dict[str, Tensor], atol: float
) -> None:
    """A pipeline call gives the tokens and the images of a published run."""
    arguments: dict[str, Any] = {
        "guidance_scale": 1 + options["cfg"],
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "temperature": options.get("temperature", 1.0),
        "smooth": options.get("more_smooth", False),
        "seed": options.get("g_seed", 0),
        "published_rng": True,
    }
    if "draft_steps" in options:
        small = golden_network(CODE["small"])
        arguments["accelerator"] = CoDe(refiner=small, draft_scales=options["draft_steps"])
    pipe = golden_pipeline(name)
    assert torch.equal(pipe(labels, output_type="latent", **arguments).images, recorded(golden, f"{run}.idx"))
    images = pipe(labels, output_type="pt", **arguments).images
    torch.testing.assert_close(images, golden[f"{run}.image"], atol=atol, rtol=0)


@pytest.mark.parametrize("run", GENERATION["runs"])
def test_published_run(run: str) -> None:
    options = GENERATION["runs"][run]
    tolerances = TOLERANCES["smooth_runs"] if options["more_smooth"] else TOLERANCES
    golden = tensors(TRANSFORMERS["base"]["cases"])
    repeats("base", run, GENERATION["class_labels"], options, golden, tolerances["images"]["atol"])


@pytest.mark.parametrize("run", CODE["runs"])
def test_published_collaboration(run: str) -> None:
    options = CODE["runs"][run]
    golden, atol = tensors(options["file"]), TOLERANCES["images"]["atol"]
    repeats(CODE["large"], run, CODE["class_labels"], options, golden, atol)


def test_previews_leave_the_published_stream_alone() -> None:
    """Smooth images spend noise when a scale is taken in, which a preview does early."""
    options = GENERATION["runs"]["smooth"]
    settings = {"guidance_scale": 1 + options["cfg"], "top_k": options["top_k"], "top_p": options["top_p"]}

    def look(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        state["preview"]()

    out = golden_pipeline("base")(
        GENERATION["class_labels"],
        **settings,
        smooth=True,
        seed=options["g_seed"],
        published_rng=True,
        output_type="pt",
        callback_on_step_end=look,
    )
    golden = tensors(TRANSFORMERS["base"]["cases"])
    close(out.images, golden["smooth.image"], "images", TOLERANCES["smooth_runs"])


def test_published_numbers_depend_on_the_batch() -> None:
    """The price of parity: image 1 alone is not image 1 of two."""
    pair = token_ids("var-class", [0, 1], published_rng=True)
    assert not torch.equal(token_ids("var-class", 1, published_rng=True, seed=4), pair[1:])
    assert torch.equal(token_ids("var-class", [0, 1], published_rng=True), pair)


def test_a_file_of_another_depth() -> None:
    with pytest.raises(CheckpointError, match="depth 2, not 3") as told:
        VARPipeline.from_single_file(
            GOLDEN / TRANSFORMERS["base"]["weights"], vq_model=golden_tokenizer("vae_a"), depth=3
        )
    assert "\n" not in str(told.value)


# -- collaborative decoding ----------------------------------------------------------------------------


@on_hosts
@pytest.mark.parametrize("draft_scales", range(1, len(SCALES) + 1))
def test_taking_over_from_itself_changes_nothing(host: str, draft_scales: int) -> None:
    plain, accelerator = token_ids(host), with_itself(host, draft_scales)
    assert torch.equal(token_ids(host, accelerator=accelerator), plain)
    for index, prompt in enumerate(PROMPTS[host]):
        alone = token_ids(host, prompt, seed=3 + index, accelerator=accelerator)
        assert torch.equal(alone[0], plain[index])


@on_hosts
def test_all_scales_by_the_model_is_plain_decoding(host: str) -> None:
    stats = pipeline(host)(PROMPTS[host], seed=0, accelerator=CoDe(draft_scales=len(SCALES))).stats
    assert stats.label == "plain()"
    assert stats.lossless
    assert stats.stages == ()
    assert not pipeline(host)(PROMPTS[host], seed=0, accelerator=CoDe(draft_scales=1)).stats.lossless


@on_hosts
@pytest.mark.parametrize("draft_scales", range(1, len(SCALES)))
def test_cost_of_a_collaboration(host: str, draft_scales: int) -> None:
    pipe = pipeline(host)
    plain = pipe(PROMPTS[host], seed=0).stats
    stats = pipe(PROMPTS[host], seed=0, accelerator=CoDe(draft_scales=draft_scales)).stats
    draft, refine = stats.stages
    assert (draft.name, refine.name) == ("draft", "refine")
    assert (draft.passes, refine.passes) == (draft_scales, len(SCALES) - draft_scales)
    assert stats.passes == len(SCALES)
    assert (draft.tokens, refine.tokens) == (BORDERS[draft_scales], TOKENS - BORDERS[draft_scales])
    assert draft.seconds > 0
    assert refine.seconds > 0
    # two numbers of 4 bytes per layer, row, slot and channel; the last scale that is drawn is never stored
    rows, dim = 2 * 3, 32
    assert stats.rows == plain.rows == rows
    slot = 2 * 4 * rows * dim
    assert draft.cache_bytes == slot * 3 * BORDERS[draft_scales - 1]
    refined = BORDERS[len(SCALES) - 1] if draft_scales < len(SCALES) - 1 else 0
    assert refine.cache_bytes == slot * 2 * refined
    assert plain.cache_bytes == slot * 3 * BORDERS[len(SCALES) - 1]
    assert stats.cache_bytes == max(draft.cache_bytes, refine.cache_bytes) < plain.cache_bytes
    assert "draft" in str(stats)
    assert [stage["name"] for stage in stats.to_dict()["stages"]] == ["draft", "refine"]


@pytest.mark.parametrize(
    ("scales", "drafted"), [(SCALES_256, 8), ((1, 2, 3, 4, 6), 4), (SCALES, 2), ((1, 2), 1), ((1,), 1)]
)
def test_four_fifths_of_the_scales_are_drafted(scales: tuple[int, ...], drafted: int) -> None:
    job: Any = SimpleNamespace(num_scales=len(scales))
    expected = Plain() if drafted == len(scales) else CoDe(draft_scales=drafted)
    assert CoDe().plan(job).accelerator == expected


def test_what_was_chosen_is_told() -> None:
    stats = pipeline("var-class")(0, seed=0, accelerator="code").stats
    assert stats.options["draft_scales"] == 2
    assert torch.equal(
        token_ids("var-class", accelerator="code"), token_ids("var-class", accelerator=CoDe(None, 2))
    )


@on_hosts
def test_the_refiner_matters(host: str) -> None:
    plain = token_ids(host)
    for draft_scales in range(1, len(SCALES)):
        border = BORDERS[draft_scales]
        refined = token_ids(host, accelerator=CoDe(draft_scales=draft_scales))
        assert torch.equal(refined[:, :border], plain[:, :border])
        assert not torch.equal(refined[:, border:], plain[:, border:])


@on_hosts
def test_refiner_alone(host: str) -> None:
    small = VARPipeline(
        pipeline(host).refiner,
        pipeline(host).vq_model,
        pipeline(host).text_encoder,
        pipeline(host).tokenizer,
        class_names=CLASSES,
        guidance_scale=3.0,
    )
    expected = small(PROMPTS[host], seed=3, output_type="latent").images
    assert torch.equal(token_ids(host, accelerator="refiner"), expected)
    accelerator = CoDe(refiner=small, draft_scales=1)
    assert torch.equal(
        token_ids(host, accelerator=accelerator), token_ids(host, accelerator=CoDe(draft_scales=1))
    )


@on_hosts
@pytest.mark.parametrize("draft_scales", range(1, len(SCALES)))
@pytest.mark.parametrize(
    ("option", "value", "rest"),
    [("temperature", 0.0, 1.0), ("temperature", 3.0, 1.0), ("top_k", 1, 0), ("top_k", 4, 0)],
)
def test_options_of_refined_scales(
    host: str, draft_scales: int, option: str, value: float, rest: float
) -> None:
    """A refiner that is the model itself draws its scales as a call with a list of options does."""
    accelerator = with_itself(host, draft_scales, **{f"refiner_{option}": value})
    listed = [rest] * draft_scales + [value] * (len(SCALES) - draft_scales)
    drawn = token_ids(host, accelerator=accelerator)
    assert torch.equal(drawn, token_ids(host, **{option: listed}))
    assert torch.equal(drawn[:, : BORDERS[draft_scales]], token_ids(host)[:, : BORDERS[draft_scales]])


@on_hosts
@pytest.mark.parametrize(
    "options",
    [{"refiner_guidance_scale": 10.0}, {"refiner_guidance_scale": 1.0}, {"refiner_top_p": 0.1}],
    ids=str,
)
def test_further_options_of_refined_scales(host: str, options: dict[str, float]) -> None:
    plain, border = token_ids(host), BORDERS[1]
    drawn = token_ids(host, accelerator=with_itself(host, 1, **options))
    assert torch.equal(drawn[:, :border], plain[:, :border])
    assert not torch.equal(drawn[:, border:], plain[:, border:])


# -- the call ------------------------------------------------------------------------------------------


def test_lists_have_an_entry_per_scale() -> None:
    plain = token_ids("var-class")
    assert torch.equal(token_ids("var-class", temperature=[1.0] * 3, top_k=[0, VOCAB_SIZE, 0]), plain)
    greedy_end = token_ids("var-class", temperature=[1.0, 1.0, 0.0])
    assert torch.equal(greedy_end[:, : BORDERS[2]], plain[:, : BORDERS[2]])
    assert not torch.equal(greedy_end, plain)


@on_hosts
def test_guidance_is_off_at_zero(host: str) -> None:
    one = PROMPTS[host][0]
    assert pipeline(host)(one, seed=0, guidance_scale=1).stats.rows == 1
    assert pipeline(host)(one, seed=0, guidance_scale=1.1).stats.rows == 2
    off, on = (token_ids(host, guidance_scale=scale) for scale in (1.0, 7.0))
    assert torch.equal(off[:, :1], on[:, :1]), "the first scale is never guided"
    assert not torch.equal(off, on)


@on_hosts
def test_prompts_matter(host: str) -> None:
    first, second, _ = PROMPTS[host]
    assert not torch.equal(token_ids(host, first), token_ids(host, second))


@on_hosts
@pytest.mark.parametrize("accelerator", [None, "code", "refiner"])
def test_output_types(host: str, accelerator: str | None) -> None:
    pipe = pipeline(host)
    options = {"seed": 1, "accelerator": accelerator}
    images = pipe(PROMPTS[host], **options).images
    assert [p.size for p in images] == [(SIZE, SIZE)] * 3
    tensor = pipe(PROMPTS[host], output_type="pt", **options).images
    array = pipe(PROMPTS[host], output_type="np", **options).images
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert max(np.abs(a * 255 - np.asarray(p)).max() for a, p in zip(array, images, strict=True)) <= 1
    latent, stats = pipe(PROMPTS[host], output_type="latent", return_dict=False, **options)
    with torch.no_grad():
        decoded = pipe.vq_model.decode_tokens(latent).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(tensor, decoded, atol=1e-5, rtol=0)
    assert stats.tokens == TOKENS


@on_hosts
def test_half_precision_cache(host: str) -> None:
    pipe = pipeline(host)
    for accelerator in (None, CoDe(draft_scales=1)):
        full, half = (
            pipe(PROMPTS[host], seed=0, accelerator=accelerator, cache_dtype=dtype)
            for dtype in (None, torch.bfloat16)
        )
        assert 2 * half.stats.cache_bytes == full.stats.cache_bytes > 0
        assert len(half.images) == 3
        assert torch.equal(half.written, full.written)


@on_hosts
def test_half_precision(host: str) -> None:
    pipe = new_pipeline(host).to(torch.bfloat16)
    for accelerator in (None, "code", "refiner"):
        out = pipe(PROMPTS[host], seed=0, accelerator=accelerator)
        assert out.stats.dtype == "bfloat16"
        assert [p.size for p in out.images] == [(SIZE, SIZE)] * 3
        assert (out.written > 0).all()


@on_hosts
def test_smooth_images(host: str) -> None:
    """Soft vectors change what the next scales see, and the images, but not what the first scale draws."""
    pipe = pipeline(host)
    plain, smooth = token_ids(host), token_ids(host, smooth=True)
    assert torch.equal(smooth[:, :1], plain[:, :1])
    options = {"seed": 3, "output_type": "pt"}
    first = pipe(PROMPTS[host], smooth=True, **options).images
    assert not torch.allclose(first, pipe(PROMPTS[host], **options).images, atol=1e-3)
    assert torch.equal(first, pipe(PROMPTS[host], smooth=True, **options).images)
    alone = pipe(PROMPTS[host][1], smooth=True, **options | {"seed": 4}).images
    torch.testing.assert_close(alone[0], first[1], atol=1e-4, rtol=0)


@on_hosts
@pytest.mark.parametrize("accelerator", [None, CoDe(draft_scales=1)], ids=["plain", "code"])
def test_callback_sees_every_scale(host: str, accelerator: Accelerator | None) -> None:
    seen, previews = [], []

    def callback(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tokens, int((state["canvas"].written[0] > 0).sum())))
        previews.append(state["preview"]())
        return state

    out = new_pipeline(host)(PROMPTS[host], seed=3, accelerator=accelerator, callback_on_step_end=callback)
    assert seen == [(0, 1, 1), (1, 4, 5), (2, 9, 14)]
    assert all([p.size for p in images] == [(SIZE, SIZE)] * 3 for images in previews)
    without = pipeline(host)(PROMPTS[host], seed=3, accelerator=accelerator).images
    for shown, last, alone in zip(previews[-1], out.images, without, strict=True):
        assert shown.tobytes() == last.tobytes() == alone.tobytes(), "previews change nothing"
    assert previews[0][0].tobytes() != previews[1][0].tobytes() != previews[2][0].tobytes()


@on_hosts
@pytest.mark.parametrize("accelerator", [None, CoDe(draft_scales=1)], ids=["plain", "code"])
@pytest.mark.parametrize("scale", range(len(SCALES) - 1))
def test_stopping_early(host: str, accelerator: Accelerator | None, scale: int) -> None:
    """The images show the scales that are there."""
    pipe, border = new_pipeline(host), BORDERS[scale + 1]

    def stop(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        pipe._interrupt = step == scale

    options: dict[str, Any] = {"seed": 3, "accelerator": accelerator}
    out = pipe(PROMPTS[host], output_type="latent", callback_on_step_end=stop, **options)
    full = token_ids(host, accelerator=accelerator)
    assert torch.equal(out.images[:, :border], full[:, :border])
    assert not out.images[:, border:].any()
    assert not out.written[:, border:].any()
    assert out.stats.passes == scale + 1
    images = pipe(PROMPTS[host], output_type="pt", callback_on_step_end=stop, **options).images
    with torch.no_grad():
        shown = pipe.vq_model.decode(pipe.vq_model.quantize.feature_maps(full)[scale])
    torch.testing.assert_close(images, shown.clamp(-1, 1) / 2 + 0.5, atol=1e-5, rtol=0)
    again = pipe(PROMPTS[host], output_type="latent", **options)
    assert torch.equal(again.images, full), "the next call is not stopped"


@pytest.mark.slow
@on_hosts
@pytest.mark.parametrize("accelerator", [None, "code"])
def test_compiled_network_draws_the_same(host: str, accelerator: str | None) -> None:
    pipe = new_pipeline(host)
    pipe.compile(backend="eager")
    for _ in range(2):
        drawn = pipe(PROMPTS[host], seed=3, accelerator=accelerator, output_type="latent").images
        assert torch.equal(drawn, token_ids(host, accelerator=accelerator))


# -- what cannot be used -------------------------------------------------------------------------------


def refused(message: str, error: type[Exception] = InputError) -> Any:
    """Raises an error whose text has `message` in it and is one sentence."""
    return pytest.raises(error, match=rf"^(?=[^\n]*{message})[^\n]+\.\Z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": "goldfisch"}, "did you mean 'goldfish'"),
        ({"prompt": 5}, "from 0 to 4"),
        ({"prompt": [-1, 0]}, "from 0 to 4"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"top_k": [1, 2]}, "2 entries"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"temperature": [1.0] * 4}, "4 entries"),
        ({"temperature": [1.0, 1.0, -1.0]}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"published_rng": True}, "pass seed"),
        ({"seed": -1}, "seed"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be an integer of at least 1"),
        ({"output_type": "jpeg"}, "pil"),
        ({"accelerator": CoDe(draft_scales=4)}, "3 scales"),
        ({"accelerator": CoDe(refiner_top_k=-1)}, "top_k"),
        ({"accelerator": CoDe(refiner_guidance_scale=-1.0)}, "guidance_scale"),
        ({"accelerator": CoDe(refiner_temperature=-1.0)}, "temperature"),
        ({"accelerator": CoDe(refiner=nn.Linear(1, 1))}, "got Linear"),
        ({"accelerator": CoDe(refiner=3)}, "got int"),
        ({"accelerator": ACCELERATORS["refiner"](refiner=nn.Linear(1, 1))}, "got Linear"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with refused(message):
        pipeline("var-class")(**{"prompt": 0, **arguments})


@pytest.mark.parametrize("prompt", [3, "", "  ", ["a cube", 1]])
def test_bad_descriptions(prompt: Any) -> None:
    with pytest.raises(InputError):
        pipeline("var-caption")(prompt)


@pytest.mark.parametrize("draft_scales", [0, -1, True, 2.0, "x"])
def test_bad_draft_scales(draft_scales: Any) -> None:
    with refused("draft_scales must be an integer of at least 1"):
        CoDe(draft_scales=draft_scales)


@pytest.mark.parametrize("name", [n for n in ACCELERATORS if n not in fitting(ScaleJob)])
def test_accelerators_of_other_families(name: str) -> None:
    with refused("does not work on var models"):
        pipeline("var-class")(0, accelerator=name)


@pytest.mark.parametrize("name", [n for n in ACCELERATORS if n not in fitting(CausalJob)])
def test_other_families(name: str) -> None:
    with refused("does not work on llamagen models; what does: .*jacobi"):
        pipeline("c2i")(0, accelerator=name)


@pytest.mark.parametrize("name", ["code", "refiner"])
def test_no_refiner(name: str) -> None:
    pipe = VARPipeline(var_transformer("class"), multiscale_vq())
    pipe.set_progress_bar_config(disable=True)
    with refused("without a refiner"):
        pipe(0, accelerator=name)
    assert pipe(0, seed=0, accelerator=CoDe(draft_scales=len(SCALES))).stats.accelerator == "plain"


@pytest.mark.parametrize(
    ("condition", "changes", "message"),
    [
        ("class", {"scales": (1, 2, 4)}, r"\(1, 2, 4\)"),
        ("class", {"scales": (1, 2)}, r"\(1, 2\) instead of"),
        ("class", {"vocab_size": VOCAB_SIZE + 1}, f"token ids {VOCAB_SIZE + 1} instead of {VOCAB_SIZE}"),
        ("class", {"codebook_dim": 5}, "numbers per token 5 instead of 4"),
        ("caption", {}, "kind of condition caption instead of class"),
        ("class", {"num_classes": 6}, "number of classes or width of text features 6"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["code", "refiner"])
def test_refiners_that_do_not_fit(name: str, condition: str, changes: dict[str, Any], message: str) -> None:
    accelerator = ACCELERATORS[name](refiner=var_transformer(condition, **changes))
    with refused(message):
        pipeline("var-class")(0, accelerator=accelerator)


def test_refiner_of_other_captions() -> None:
    accelerator = CoDe(refiner=var_transformer("caption", caption_dim=8))
    with refused("width of text features 8 instead of 16"):
        pipeline("var-caption")("a cube", accelerator=accelerator)


def test_refiner_of_another_family() -> None:
    with refused("paradigm causal instead of next-scale"):
        pipeline("var-class")(0, accelerator=CoDe(refiner=pipeline("c2i")))


def test_components_must_fit() -> None:
    network = var_transformer("class")
    with refused("scales"):
        VARPipeline(network, multiscale_vq(scales=(1, 3)))
    with refused("codebook entries"):
        VARPipeline(network, multiscale_vq(codebook_size=VOCAB_SIZE + 1))
    with refused("numbers"):
        VARPipeline(network, multiscale_vq(codebook_dim=8))
    with refused("scales"):
        VARPipeline(network, multiscale_vq(), refiner=var_transformer("class", scales=(1, 3)))
    with refused("text_encoder"):
        VARPipeline(var_transformer("caption"), multiscale_vq())


# -- editing -------------------------------------------------------------------------------------------


def source_image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def right_half() -> Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[:, SIZE // 2 :] = 1
    return mask


KEPT = torch.tensor([True] + [True, False] * 2 + [True, False, False] * 3)
"""What stays of the right half: of 3 columns the outer two are touched; of 2 columns the right one."""


def source_token_ids(host: str, image: Image.Image) -> Tensor:
    with torch.no_grad():
        return pipeline(host).vq_model.encode(image_tensor(image, (SIZE, SIZE))).indices


def test_kept_tokens_are_judged_by_the_middle_of_their_cell() -> None:
    """At coarse scales: what is painted around the middle does not count, wherever there are more than four sites."""
    mask = torch.ones(8, 8)
    mask[3:5, 3:5] = 0
    fine, coarse = kept_tokens(mask, ScaleSchedule((2, 8)))[4:], kept_tokens(mask, ScaleSchedule((3, 8)))[:9]
    assert torch.equal(fine, mask.flatten() == 0)
    assert coarse.tolist() == [False] * 4 + [True] + [False] * 4, (
        "kept, with more than half of its cell painted"
    )
    mask = torch.zeros(8, 8)
    mask[3:5, 3:5] = 1
    coarse = kept_tokens(mask, ScaleSchedule((2, 8)))[:4]
    assert coarse.all(), "the middles of the four cells are not painted"


def test_kept_tokens_of_a_half_mask() -> None:
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    expected = [
        *[True],  # the first scale always stays
        *[False, True] * 2,
        *[False, False, True] * 3,  # the column in the middle is half in the mask, so not mostly outside
        *[False, False, True, True] * 4,
    ]
    schedule = ScaleSchedule((1, 2, 3, 4))
    assert kept_tokens(mask, schedule).tolist() == expected
    one_pixel_more = mask.clone()
    one_pixel_more[:, 4] = 1  # touches a third column of the finest scale
    assert kept_tokens(one_pixel_more, schedule)[-4:].tolist() == [False, False, False, True]
    assert kept_tokens(torch.ones(8, 8), schedule).tolist() == [True] + [False] * 29
    assert torch.equal(kept_tokens(right_half(), SCHEDULE), KEPT)


@on_hosts
@pytest.mark.parametrize("accelerator", [None, "code", "refiner"])
@pytest.mark.parametrize("prompted", [False, True])
def test_inpainting(host: str, accelerator: str | None, prompted: bool) -> None:
    prompt = PROMPTS[host][1] if prompted else None
    source = source_token_ids(host, source_image())

    def painted(**options: Any) -> Any:
        return pipeline(host).inpaint(
            source_image(), right_half(), prompt, accelerator=accelerator, **options
        )

    drawn = painted(seed=1, num_images=3, output_type="latent")
    tokens = drawn.images
    assert tokens.shape == (3, TOKENS)
    assert (drawn.written > 0).all()
    assert torch.equal(tokens[:, KEPT], source[:, KEPT].expand(3, -1))
    assert not torch.equal(tokens[:, ~KEPT], source[:, ~KEPT].expand(3, -1))
    assert not torch.equal(tokens[0, ~KEPT], tokens[1, ~KEPT])
    assert torch.equal(painted(seed=2, output_type="latent").images[0], tokens[1])
    assert drawn.stats.rows == (6 if prompted else 3)
    assert len(drawn.stats.stages) == (2 if accelerator == "code" else 0)
    assert [p.size for p in painted(seed=1).images] == [(SIZE, SIZE)]


@on_hosts
def test_inpainting_is_watched_like_a_call(host: str) -> None:
    seen: list[tuple[int, int]] = []

    def watch(pipe: Any, scale: int, tokens: int, state: dict[str, Any]) -> None:
        assert state["preview"]()[0].size == (SIZE, SIZE)
        seen.append((scale, tokens))

    out = pipeline(host).inpaint(
        source_image(), right_half(), PROMPTS[host][1], seed=1, callback_on_step_end=watch
    )
    assert seen == [(i, side * side) for i, side in enumerate(SCALES)]
    alone = pipeline(host).inpaint(source_image(), right_half(), PROMPTS[host][1], seed=1)
    assert out.images[0].tobytes() == alone.images[0].tobytes()


@on_hosts
def test_inpainting_without_a_prompt_is_unconditional(host: str) -> None:
    """Greedy tokens are the most likely ones of a network that is told nothing, of one pass over all scales."""
    pipe = pipeline(host)
    options = {"seed": 0, "temperature": 0.0, "output_type": "latent"}
    out = pipe.inpaint(source_image(), right_half(), guidance_scale=10.0, **options)
    assert out.stats.rows == 1
    with torch.no_grad():
        given = pipe._condition(PROMPTS[host][:1])
        condition, mask = given.values, given.mask
        inputs = pipe.vq_model.quantize.inputs(out.images)
        logits = pipe.transformer(condition, inputs, mask, dropped=torch.ones(1, dtype=torch.bool))
    assert torch.equal(logits.argmax(-1)[:, ~KEPT], out.images[:, ~KEPT])
    prompted = pipe.inpaint(source_image(), right_half(), PROMPTS[host][1], guidance_scale=10.0, **options)
    assert not torch.equal(prompted.images, out.images)


def test_images_and_masks_of_all_kinds() -> None:
    pipe, image = pipeline("var-class"), source_image()
    options = {"seed": 0, "output_type": "latent"}
    expected = pipe.inpaint(image, right_half(), **options).images
    array = np.asarray(image, dtype=np.float32) / 255
    for given in (array, torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(array)[None]):
        assert torch.equal(pipe.inpaint(given, right_half(), **options).images, expected)
    large = torch.zeros(4 * SIZE, 4 * SIZE)
    large[:, 2 * SIZE :] = 1
    drawn = Image.fromarray((right_half().numpy() * 255).astype(np.uint8))
    for mask in (right_half().bool(), right_half().numpy(), right_half()[None], large, drawn):
        assert torch.equal(pipe.inpaint(image, mask, **options).images, expected)
    alpha = np.zeros((SIZE, SIZE, 4), np.uint8)
    alpha[:, SIZE // 2 :] = 255
    assert torch.equal(pipe.inpaint(image, Image.fromarray(alpha), **options).images, expected)


AS_KINDS = {
    "PIL": Image.fromarray,
    "PIL, 1 bit": lambda mask: Image.fromarray(mask).convert("1"),
    "PIL, 16 bits": lambda mask: Image.fromarray(mask.astype(np.uint16) * 65535),
    "PIL, strokes": lambda mask: Image.merge(
        "LA", [Image.new("L", mask.shape[::-1]), Image.fromarray(mask).convert("L")]
    ),
    "numpy": lambda mask: mask,
    "labels": lambda mask: mask.astype(np.int64),
    "floats": lambda mask: mask.astype(np.float32),
    "tensor": torch.from_numpy,
    "tensor of one channel": lambda mask: torch.from_numpy(mask)[None],
    "a half as large": lambda mask: mask[::2, ::2],
    "tensor, three times as large": lambda mask: (
        torch.from_numpy(mask).repeat_interleave(3, 0).repeat_interleave(3, 1)
    ),
}
"""Ways to hand over a mask of bool [H, W]."""


@pytest.mark.parametrize("kind", AS_KINDS)
@pytest.mark.parametrize("shape", [(128, 256), (256, 128), (96, 96), (70, 200)], ids=str)
def test_a_mask_of_any_kind_is_cropped_as_its_image_is(kind: str, shape: tuple[int, int]) -> None:
    height, width = shape
    marked = np.zeros(shape, bool)
    marked[height // 4 : height // 2, width // 2 - 16 : width // 2 + 16] = True
    image = np.full((*shape, 3), 255, np.uint8)
    image[marked] = (255, 0, 0)
    for given in (Image.fromarray(image), image, torch.from_numpy(image).permute(2, 0, 1)):
        assert rgb_image(given).size == (width, height)
        red = image_tensor(given, (64, 64))[0, 1] < 0
        painted = mask_tensor(checked_mask(AS_KINDS[kind](marked), (width, height)), (64, 64)) > 0
        assert red.sum() > 20
        assert painted[red].all()
        # one pixel on either side is touched where the edges fall within a pixel
        assert painted.sum() <= (red.any(1).sum() + 2) * (red.any(0).sum() + 2)


@pytest.mark.parametrize("side", [500, 512, 3000])
@pytest.mark.parametrize("stroke", [1, 2])
def test_thin_strokes_are_painted(side: int, stroke: int) -> None:
    mask = np.zeros((side, side), np.uint8)
    mask[side // 3 : side // 3 + stroke] = 255
    expected = torch.zeros(128, 128)
    expected[side // 3 * 128 // side : -(-(side // 3 + stroke) * 128 // side)] = 1
    for given in (mask, Image.fromarray(mask)):
        assert torch.equal(mask_tensor(given, (128, 128)), expected)


def test_masks_are_enlarged_without_spreading() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    expected = torch.zeros(12, 12)
    expected[3:6, 6:9] = 1
    assert torch.equal(mask_tensor(mask, (12, 12)), expected)


@pytest.mark.parametrize(
    ("mask", "image"),
    [((100, 100), (200, 100)), ((100, 200), (200, 100)), ((300, 400), (400, 300)), ((64, 64), (65, 128))],
    ids=str,
)
def test_masks_of_another_aspect_are_refused(mask: tuple[int, int], image: tuple[int, int]) -> None:
    drawn = Image.new("L", mask, 255)
    for given in (drawn, np.asarray(drawn), torch.from_numpy(np.array(drawn))):
        with refused(f"mask is {mask[0]} × {mask[1]} pixels but the image {image[0]} × {image[1]}"):
            pipeline("var-class").inpaint(Image.new("RGB", image), given, 0)


def test_scaled_masks_may_be_rounded() -> None:
    for mask, image in (((500, 333), (1000, 667)), ((333, 500), (667, 1000)), ((6, 4), (3000, 2001))):
        assert checked_mask(Image.new("1", mask, 1), image).all()


def test_what_is_cut_off_cannot_be_painted() -> None:
    left = np.zeros((128, 256), bool)
    left[:, :40] = True
    for given in (left, Image.fromarray(left), torch.from_numpy(left)):
        with refused("cut off"):
            mask_tensor(given, (128, 128))


def test_a_photo_is_painted_upright() -> None:
    pipe = pipeline("var-class")
    upright = source_image().resize((3 * SIZE, 4 * SIZE))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    mask = Image.new("L", upright.size)
    mask.paste(255, (0, 0, 3 * SIZE, 2 * SIZE))
    options = {"seed": 0, "output_type": "latent"}
    drawn = pipe.inpaint(stored, mask, **options).images
    assert torch.equal(drawn, pipe.inpaint(upright, mask, **options).images)


@on_hosts
@pytest.mark.parametrize("accelerator", [None, "code"])
def test_outpainting(host: str, accelerator: str | None) -> None:
    pipe, box = pipeline(host), (0, 0, 4, 4)
    options = {"seed": 1, "accelerator": accelerator}
    assert pipe.outpaint(source_image(), box, **options).images[0].size == (SIZE, SIZE)
    larger, mask = placed(source_image(), box, (SIZE, SIZE))
    assert mask.sum() == SIZE * SIZE - 16
    assert not mask[:4, :4].any()
    inner = np.asarray(source_image().resize((4, 4), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(larger)[:4, :4], inner)
    assert np.array_equal(np.asarray(larger)[4:, 4:], np.broadcast_to(inner[3, 3], (2, 2, 3)))
    kept = kept_tokens(mask, SCHEDULE)
    assert kept[BORDERS[2] :].tolist() == [True, True, False] * 2 + [False] * 3
    tokens = pipe.outpaint(source_image(), box, PROMPTS[host][0], output_type="latent", **options).images
    assert torch.equal(tokens[:, kept], source_token_ids(host, larger)[:, kept])
    inpainted = pipe.inpaint(larger, mask, PROMPTS[host][0], output_type="latent", **options).images
    assert torch.equal(tokens, inpainted)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(5, SIZE, SIZE), "image"),
        (torch.rand(2, 3, SIZE, SIZE), "image"),
        (2 * torch.rand(3, SIZE, SIZE) - 1, "from 0 to 1"),
        (torch.rand(3, 0, SIZE), "image is empty"),
        ("cat.png", "image"),
        (None, "image"),
    ],
    ids=["channels", "batch", "numbers", "empty", "name", "none"],
)
def test_images_that_cannot_be_edited(image: Any, message: str) -> None:
    with refused(message):
        pipeline("var-class").inpaint(image, right_half())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(SIZE, SIZE), "black everywhere"),
        (Image.new("L", (50, 50)), "black everywhere"),
        (torch.full((SIZE, SIZE), 0.4), "black everywhere"),
        (torch.ones(2, SIZE, SIZE), r"\[H, W\]"),
        ("mask.png", r"\[H, W\]"),
        (None, r"\[H, W\]"),
    ],
    ids=["black", "black image", "dark", "channels", "name", "none"],
)
def test_bad_masks(mask: Any, message: str) -> None:
    with refused(message):
        mask_tensor(mask, (SIZE, SIZE))
    with refused(message):
        pipeline("var-class").inpaint(source_image(), mask)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, SIZE + 1, SIZE), "within 0 to"),
        ((-1, 0, 4, 4), "within 0 to"),
        ((3, 0, 3, 4), "within 0 to"),
        ((0, 4, 4, 3), "within 0 to"),
        ((0, 0, SIZE, SIZE), "covers the whole"),
        ((0, 0, 4), "left, top, right, bottom"),
        ((0.5, 0, 4, 4), "left, top, right, bottom"),
    ],
)
def test_bad_boxes(box: Any, message: str) -> None:
    with refused(message):
        pipeline("var-class").outpaint(source_image(), box)


def test_outpainting_takes_images_of_all_kinds() -> None:
    image, box = source_image(), (0, 0, 4, 4)
    larger, _ = placed(image, box, (SIZE, SIZE))
    stored = image.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    for given in (stored, np.asarray(image), torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255):
        assert placed(given, box, (SIZE, SIZE))[0].tobytes() == larger.tobytes()
    with refused("the image must be"):
        pipeline("var-class").outpaint("cat.png", box)


# -- saving and loading --------------------------------------------------------------------------------


def same_images(a: VARPipeline, b: VARPipeline, prompts: Any, **options: Any) -> bool:
    pairs = zip(a(prompts, **options).images, b(prompts, **options).images, strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


@on_hosts
def test_save_and_load(host: str, tmp_path: Path) -> None:
    pipe = pipeline(host)
    pipe.save_pretrained(tmp_path / "model")
    for loader in (VARPipeline, AutoPipeline):
        loaded = loader.from_pretrained(tmp_path / "model")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded, VARPipeline)
        assert loaded.config.guidance_scale == 3.0
        assert len(loaded.refiner.blocks) == 2
        assert not loaded.refiner.training
        for accelerator in (None, "code", "refiner"):
            assert same_images(loaded, pipe, PROMPTS[host], seed=0, accelerator=accelerator)


def test_a_saved_pipeline_by_name_is_a_refiner(tmp_path: Path) -> None:
    small = VARPipeline(pipeline("var-class").refiner, pipeline("var-class").vq_model)
    small.save_pretrained(tmp_path / "small")
    named = CoDe(refiner=str(tmp_path / "small"), draft_scales=1)
    expected = token_ids("var-class", accelerator=CoDe(draft_scales=1))
    assert torch.equal(token_ids("var-class", accelerator=named), expected)
    with pytest.raises(CheckpointError):
        token_ids("var-class", accelerator=CoDe(refiner="no-such-model", draft_scales=1))


def test_save_and_load_without_a_refiner(tmp_path: Path) -> None:
    pipe = VARPipeline(var_transformer("class"), multiscale_vq(), top_k=5, top_p=0.9, temperature=0.8)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = AutoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.refiner is None
    assert (loaded.config.top_k, loaded.config.top_p, loaded.config.temperature) == (5, 0.9, 0.8)
    assert same_images(loaded, pipe, [0, 3], seed=0)


class Hub:
    """Stands for the hub: published names lead to tiny files in the published layout."""

    def __init__(self, folder: Path, weights: dict[str, str]) -> None:
        self.asked: list[tuple[str, str]] = []
        self.files = {}
        for name, source in weights.items():
            self.files[name] = folder / name
            torch.save(tensors(source), folder / name)

    def download(self, repository: str, name: str, **_: Any) -> str:
        self.asked.append((repository, name))
        return str(self.files[name])


IMAGE_TOKENIZER = ("FoundationVision/var", "vae_ch160v4096z32.pth")
# a codebook of 64 entries of 8 numbers, as the transformers want; the tokenizer's file serves any schedule
WIDE = "vae_b.safetensors"


def published(
    name: str, weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[VARPipeline, Hub]:
    hub = Hub(tmp_path, {IMAGE_TOKENIZER[1]: WIDE, **weights})
    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", hub.download)
    pipe = AutoPipeline.from_pretrained(name, **options)
    assert isinstance(pipe, VARPipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe, hub


def test_published_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, hub = published("var-d16", {"var_d16.pth": "var_base.safetensors"}, tmp_path, monkeypatch)
    assert sorted(hub.asked) == [IMAGE_TOKENIZER, ("FoundationVision/var", "var_d16.pth")]
    assert pipe.refiner is None
    assert pipe.vq_model.schedule == pipe.transformer.schedule
    settings = pipe.config
    assert (settings.guidance_scale, settings.top_k, settings.top_p) == (2.5, 900, 0.96)
    assert len(settings.class_names) == 1000
    assert pipe.class_label("goldfish") == 1
    assert len(pipe(["tench", "goldfish"], seed=0).images) == 2


def test_published_pair_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"drafter_8.pth": "var_large.safetensors", "refiner_8.pth": "var_base.safetensors"}
    pipe, hub = published("var-code-8", weights, tmp_path, monkeypatch, dtype=torch.bfloat16)
    pair = [("Zigeng/VAR_CoDe", "drafter_8.pth"), ("Zigeng/VAR_CoDe", "refiner_8.pth")]
    assert sorted(hub.asked) == sorted([IMAGE_TOKENIZER, *pair])
    assert (len(pipe.transformer.blocks), len(pipe.refiner.blocks)) == (3, 2)
    assert pipe.transformer.dtype == pipe.refiner.dtype == torch.bfloat16
    assert pipe.vq_model.dtype == torch.float32
    settings = pipe.config
    assert (settings.guidance_scale, settings.top_k, settings.top_p) == (2.5, 600, 0.96)
    stats = pipe(3, seed=0, top_k=0, accelerator="code").stats
    assert stats.options["draft_scales"] == 3
    assert [stage.passes for stage in stats.stages] == [3, 1]


@pytest.mark.parametrize("error", [OSError("no route to host"), LocalEntryNotFoundError("offline")])
def test_failed_download(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", fail)
    with refused(r"could not be downloaded.*VARPipeline\.from_single_file", CheckpointError):
        AutoPipeline.from_pretrained("var-d30")


def test_single_files_of_a_pair(tmp_path: Path) -> None:
    """Files and networks are taken alike."""
    small = golden_network("base")
    torch.save(tensors("var_base.safetensors"), tmp_path / "small.pth")
    settings: dict[str, Any] = {"depth": 3, "guidance_scale": 4.0, "top_k": 20}
    large = GOLDEN / "var_large.safetensors"
    pipes = [
        VARPipeline.from_single_file(large, vq_model=tokens, refiner=refiner, **settings)
        for tokens, refiner in (
            (GOLDEN / WIDE, tmp_path / "small.pth"),
            (str(GOLDEN / WIDE), small),
        )
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert (pipe.config.guidance_scale, pipe.config.top_k) == (4.0, 20)
    assert same_images(*pipes, [3, 7], seed=1, accelerator="code")
