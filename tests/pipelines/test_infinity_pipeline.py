"""The Infinity pipeline as a user calls it: sizes, guidance, texts, bits as a distribution, editing, loading."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests.enumeration import misfit
from tests.tiny import (
    PROMPTS,
    SCALES,
    WORDS,
    bitwise_vq,
    infinity_transformer,
    new_infinity_pipeline,
    new_pipeline,
    pipeline,
    text_encoder,
    var_transformer,
)
from varaccel import AutoPipeline, CoDe
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.errors import CheckpointError, InputError
from varaccel.hosts.next_scale.bit_sampling import BitDistribution, BitDraws
from varaccel.nn.aspect_schedules import SIZES, TEMPLATES, infinity_schedule
from varaccel.nn.scale_schedule import ScaleSchedule
from varaccel.pipelines.infinity import InfinityPipeline
from varaccel.pipelines.inpainting import image_tensor, kept_tokens
from varaccel.tokenizers.bitwise_vq import unpack_bits
from varaccel.tokenizers.text import WordTokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "infinity"
SCHEDULE = ScaleSchedule(SCALES)
BORDERS, TOKENS = SCHEDULE.borders, SCHEDULE.num_tokens
PROMPT, *_ = PROMPTS["infinity"]


def token_ids(prompt: Any = PROMPT, **options: Any) -> Tensor:
    pipe: Any = pipeline("infinity")
    return pipe(prompt, output_type="latent", **{"seed": 3, **options}).images


def refused(message: str, error: type[Exception] = InputError) -> Any:
    """Raises an error whose text has `message` in it and is one sentence."""
    return pytest.raises(error, match=rf"^(?=[^\n]*{message})[^\n]+\.\Z")


def quiet(pipe: InfinityPipeline) -> InfinityPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_pipeline(grids: Any, **changes: Any) -> InfinityPipeline:
    """A pipeline of other grids, or of other components."""
    pipe: Any = pipeline("infinity")
    return quiet(InfinityPipeline(**{**pipe.components, "temperature": 1.0, "scales": grids, **changes}))


# -- sizes ---------------------------------------------------------------------------------------------


@cache
def published_sizes() -> InfinityPipeline:
    """With a tokenizer of 2 pixels per token; images of 64 x 64 tokens unless a call says otherwise."""
    return own_pipeline(None, height=128, width=128)


def test_every_published_size_is_drawn() -> None:
    pipe, seen = published_sizes(), set()
    for ratio in TEMPLATES:
        for size in SIZES:
            schedule = infinity_schedule(ratio, size)
            height, width = pipe.vq_model.image_size(schedule)
            assert pipe._schedule(height, width, None) == schedule
            seen.add((height, width))
    assert len(seen) == 60, "a size means one schedule"
    assert pipe.image_size == 128
    assert len(pipe.schedule) == 13


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        (16, "1:1", "1.0"),
        (16, "16:9", "0.571"),
        (16, "9:16", "1.75"),
        (20, "4:3", "0.75"),
        (16, "1000:1", "0.333"),
        (32, "3:1", "0.333"),
    ],
)
def test_a_ratio_is_that_of_the_nearest_template_at_the_pipelines_own_size(
    size: int, ratio: str, expected: str
) -> None:
    name = {16: "0.06M", 20: "1M", 32: "0.25M"}[size]
    side = infinity_schedule("1.0", name).last_grid[0] * 2
    pipe = own_pipeline(None, height=side, width=side)
    assert pipe._schedule(None, None, ratio) == infinity_schedule(expected, name)


def test_images_of_a_size_and_a_ratio_have_it() -> None:
    pipe = own_pipeline(None, height=32, width=32)
    out = pipe(PROMPT, seed=0, ratio="16:9", temperature=0.5)
    down, across = infinity_schedule("0.571", "0.06M").last_grid
    assert out.images[0].size == (2 * across, 2 * down)
    assert out.stats.passes == 7
    by_size = pipe(PROMPT, seed=0, height=np.int64(2 * down), width=2 * across, temperature=0.5)
    assert by_size.images[0].tobytes() == out.images[0].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "no images of 100 × 128 pixels; the nearest size it has is"),
        ({"height": 10**6, "width": 3}, "the nearest size it has is"),
        ({"height": 0}, "positive whole numbers, got 0 and 128"),
        ({"width": -8}, "positive whole numbers"),
        ({"width": 128.5}, "positive whole numbers"),
        ({"width": "128"}, "positive whole numbers"),
        ({"width": [128]}, "positive whole numbers"),
        ({"ratio": "16:9", "width": 128}, "takes the place of height and width"),
        ({"ratio": "wide"}, "whole numbers, such as '16:9'"),
        ({"ratio": "0:1"}, "whole numbers, such as '16:9'"),
        ({"ratio": 1.5}, "whole numbers, such as '16:9'"),
    ],
    ids=str,
)
def test_sizes_that_are_none(options: dict[str, Any], message: str) -> None:
    with refused(message):
        published_sizes()(PROMPT, **options)


def test_own_scales() -> None:
    pipe: Any = pipeline("infinity")
    assert pipe.schedule == SCHEDULE
    assert pipe(PROMPT, seed=0, height=6, width=6).images[0].size == (6, 6)
    assert pipe(PROMPT, seed=0, height=6).images[0].size == (6, 6)
    for options in ({"height": 8}, {"ratio": "1:1"}, {"height": 6, "width": 8}, {"width": "6"}):
        with refused("draws images of 6 × 6 pixels; leave height, width and ratio out"):
            pipe(PROMPT, **options)
    wide = own_pipeline([1, [1, 2], (2, 4)])
    assert wide(PROMPT, seed=0).images[0].size == (8, 4)
    with refused("no squares: 4 × 8"):
        _ = wide.image_size
    with refused("from \\(1, 1\\) on"):
        own_pipeline([2, 3])(PROMPT)


def test_a_pipeline_of_an_odd_size_is_not_made() -> None:
    with refused("no images of 1024 × 1024 pixels; the nearest size it has is"):
        own_pipeline(None)


# -- guidance and sampling -----------------------------------------------------------------------------


def test_guidance_per_scale() -> None:
    plain = token_ids(guidance_scale=3.0)
    assert torch.equal(token_ids(guidance_scale=[3.0] * 3), plain)
    late = token_ids(guidance_scale=[3.0, 3.0, 1.0])
    assert torch.equal(late[:, : BORDERS[2]], plain[:, : BORDERS[2]])
    assert not torch.equal(late, plain)
    off = token_ids(guidance_scale=1.0)
    assert not torch.equal(off, plain)
    assert torch.equal(token_ids(guidance_scale=[1.0, 1.0, 3.0])[:, : BORDERS[2]], off[:, : BORDERS[2]])


def test_rows_of_guidance() -> None:
    pipe: Any = pipeline("infinity")
    for scale, rows in ((1.0, 1), (0.0, 1), (1.1, 2), ([1.0, 1.0, 2.0], 2)):
        assert pipe(PROMPT, seed=0, guidance_scale=scale).stats.rows == rows


def test_guidance_layers() -> None:
    plain = token_ids()
    for layers in ((-1,), (-2,), (0, -1), [-1, -2]):
        assert not torch.equal(token_ids(guidance_layers=layers), plain), layers
        off = token_ids(guidance_layers=layers, guidance_scale=1.0)
        assert torch.equal(off, token_ids(guidance_scale=1.0)), layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"prompt": 3}, "takes descriptions"),
        ({"prompt": "  "}, "no text"),
        ({"guidance_layers": [1]}, "blocks from the end, got 1"),
        ({"guidance_layers": [0, -3]}, "-1 to -2, for blocks from the end, got -3"),
        ({"guidance_layers": [-0.5]}, "blocks from the end"),
        ({"guidance_layers": [False]}, "blocks from the end"),
        ({"guidance_layers": ()}, "at least one layer"),
        ({"guidance_layers": 0}, "at least one layer"),
        ({"guidance_scale": [1.0, 2.0]}, "2 entries"),
        ({"guidance_scale": [1.0, 2.0, -1.0]}, "guidance_scale"),
        ({"temperature": [1.0] * 4}, "4 entries"),
        ({"temperature": [1.0, -1.0, 1.0]}, "temperature"),
        ({"top_k": [1, 2]}, "2 entries"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": [0.9] * 3}, "top_p"),
        ({"negative_prompt": ["a", "red", "cube"]}, "3 negative prompts for 1 prompts"),
        ({"negative_prompt": ["a", "red"], "guidance_scale": 1.0}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 3}, "negative_prompt must be a text"),
        ({"negative_prompt": []}, "negative_prompt must be a text"),
        ({"published_rng": True}, "pass seed"),
        ({"output_type": "jpeg"}, "pil"),
        ({"accelerator": CoDe(draft_scales=4)}, "3 scales"),
        ({"accelerator": CoDe(refiner_temperature=-1.0)}, "temperature"),
        ({"accelerator": "jacobi"}, "does not work on infinity models"),
        ({"accelerator": CoDe(refiner=var_transformer("caption"))}, "refiner"),
        ({"accelerator": CoDe(refiner=infinity_transformer(token_bits=5))}, "refiner"),
        ({"accelerator": CoDe(refiner=infinity_transformer(text_dim=24))}, "width of text features 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    pipe: Any = pipeline("infinity")
    with refused(message):
        pipe(**{"prompt": PROMPT, **arguments})


def test_lists_have_an_entry_per_scale() -> None:
    plain = token_ids()
    assert torch.equal(token_ids(temperature=[1.0] * 3, top_k=[0, 2, 900]), plain)
    greedy = token_ids(temperature=0.0)
    for options in ({"temperature": [1.0, 1.0, 0.0]}, {"top_k": [0, 0, 1]}):
        end = token_ids(**options)
        assert torch.equal(end[:, : BORDERS[2]], plain[:, : BORDERS[2]])
        assert not torch.equal(end, plain)
    assert torch.equal(token_ids(top_k=1), greedy)
    assert torch.equal(token_ids(top_p=0.5), greedy), "less likely values have at most one half"
    assert torch.equal(token_ids(temperature=0.0, seed=9), greedy)


def teacher_forced(pipe: InfinityPipeline, prompt: str, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Guided logits [n, L, D, 2] of token ids [n, L], in one pass over all scales."""
    given = pipe._condition([prompt])
    assert given.mask is not None
    count, quantizer = len(tokens), pipe.vq_model.quantizer(pipe.schedule)
    values, mask = given.values.expand(count, -1, -1), given.mask.expand(count, -1)
    inputs = quantizer.inputs(tokens)
    both = [
        pipe.transformer(values, inputs, pipe.schedule, mask, torch.full((count,), dropped))
        for dropped in (False, True)
    ]
    return (scale * both[0] + (1 - scale) * both[1]).unflatten(-1, (-1, 2))


@torch.no_grad()
def test_greedy_bits_are_the_likelier_ones() -> None:
    pipe: Any = pipeline("infinity")
    tokens = token_ids(temperature=0.0, guidance_scale=2.0)
    likelier = teacher_forced(pipe, PROMPT, tokens, 2.0).argmax(-1)
    assert torch.equal(unpack_bits(tokens, 4).long(), likelier)


# -- bits as a distribution ----------------------------------------------------------------------------

GRIDS = ((1, 1), (1, 2), (1, 3))
BITS = 2
GROUPS = ((0, 1, 2), (3, 4, 5), (0, 5), (1, 3, 4))
DRAWS = 2048
LAWS: dict[str, dict[str, float]] = {
    "plain": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 2.5},
    "filtered": {"guidance_scale": 1.5, "temperature": 0.8, "top_p": 0.75},
}


@cache
def few_bits() -> InfinityPipeline:
    """4096 images: six tokens of two bits."""
    words = WordTokenizer.from_words(WORDS, max_length=8)
    return quiet(
        InfinityPipeline(
            infinity_transformer(token_bits=BITS),
            bitwise_vq(bits=BITS),
            text_encoder(words),
            words,
            **{"scales": GRIDS, "temperature": 1.0, "top_p": 0.0},
        )
    )


@cache
@torch.no_grad()
def exact(law: str) -> Tensor:
    """[4, 4, 4, 4, 4, 4] float64, the probability of every image, by formulas of its own."""
    options = LAWS[law]
    images = torch.cartesian_prod(*[torch.arange(2**BITS)] * 6)
    logits = teacher_forced(few_bits(), PROMPT, images, options["guidance_scale"]).double()
    one = torch.sigmoid((logits[..., 1] - logits[..., 0]) / options.get("temperature", 1.0))
    least = 1 - options.get("top_p", 1.0)
    one = torch.where(one <= least, 0.0, torch.where(1 - one <= least, 1.0, one))
    bits = torch.stack([images & 1, images >> 1], -1)
    found = torch.where(bits == 1, one, 1 - one).flatten(1).prod(1)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    return (found / found.sum()).view([2**BITS] * 6)


@cache
def drawn(law: str) -> Tensor:
    return few_bits()(PROMPT, num_images_per_prompt=DRAWS, seed=0, output_type="latent", **LAWS[law]).images


@pytest.mark.parametrize("law", LAWS)
def test_images_follow_the_law_of_the_network(law: str) -> None:
    assert misfit(drawn(law), exact(law), GROUPS) < 4.5
    for batch in (1, 3):
        one = few_bits()(
            PROMPT, num_images_per_prompt=7, batch_size=batch, seed=0, output_type="latent", **LAWS[law]
        )
        assert torch.equal(one.images, drawn(law)[:7]), "no image depends on its batch"


def test_another_law_is_noticed() -> None:
    assert misfit(drawn("plain"), exact("guided"), GROUPS) > 10
    assert misfit(drawn("guided"), exact("plain"), GROUPS) > 10
    assert (exact("filtered") == 0).any(), "filters leave out images"


def test_bits_that_share_their_noise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BitDistribution.sample

    def shared(self: BitDistribution, noise: Tensor) -> Tensor:
        return whole(self, noise[..., :2].repeat(1, 1, BITS))

    monkeypatch.setattr(BitDistribution, "sample", shared)
    wrong = few_bits()(PROMPT, num_images_per_prompt=DRAWS, seed=0, output_type="latent", **LAWS["plain"])
    assert misfit(wrong.images, exact("plain"), GROUPS) > 10


def test_draws_belong_to_an_image_and_a_position() -> None:
    logits = torch.randn(3, 9, 4, 2, generator=torch.Generator().manual_seed(0))
    everywhere = BitDistribution(logits)

    def draws() -> BitDraws:
        return BitDraws(Randomness.draw(image_generators(3, 5), 9, torch.device("cpu")), 4)

    whole = draws().sample(everywhere, torch.arange(9))
    order = torch.tensor([7, 2, 8, 0])
    one = draws()
    parts = [
        one.sample(BitDistribution(logits[:, places]), places) for places in (order, torch.tensor([1, 3]))
    ]
    assert torch.equal(torch.cat(parts, 1), whole[:, [7, 2, 8, 0, 1, 3]])
    some = draws().part([2, 0]).sample(BitDistribution(logits[[2, 0]]), torch.arange(9))
    assert torch.equal(some, whole[[2, 0]])
    assert len(whole.unique()) > 8


def test_images_do_not_depend_on_batch_or_number_type_of_the_cache() -> None:
    together = token_ids(PROMPTS["infinity"])
    for index, prompt in enumerate(PROMPTS["infinity"]):
        assert torch.equal(token_ids(prompt, seed=3 + index)[0], together[index])
    assert torch.equal(token_ids(PROMPTS["infinity"], batch_size=2), together)
    pipe: Any = pipeline("infinity")
    full, half = (pipe(PROMPT, seed=0, cache_dtype=dtype).stats for dtype in (None, torch.bfloat16))
    assert 2 * half.cache_bytes == full.cache_bytes > 0


# -- texts ---------------------------------------------------------------------------------------------


def test_negative_prompts() -> None:
    two = PROMPTS["infinity"][:2]
    plain, one = token_ids(two), token_ids(two, negative_prompt="a blue cube")
    assert not torch.equal(one, plain)
    assert torch.equal(token_ids(two, negative_prompt=""), plain)
    assert torch.equal(token_ids(two, negative_prompt=["a blue cube"] * 2), one)
    each = token_ids(two, negative_prompt=["sphere", "a blue cube"])
    assert torch.equal(each[1], one[1])
    assert not torch.equal(each[0], one[0])
    several = token_ids(two, negative_prompt=["sphere", "a blue cube"], num_images_per_prompt=2, batch_size=3)
    alone = token_ids(two[1], negative_prompt="a blue cube", num_images_per_prompt=2, seed=5)
    assert torch.equal(several[2:], alone)
    off = token_ids(two, guidance_scale=1.0)
    assert torch.equal(token_ids(two, guidance_scale=1.0, negative_prompt="cube"), off)


def test_a_negative_prompt_of_the_null_features_is_no_negative_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe: Any = new_pipeline("infinity")
    plain, real = token_ids(), pipe._features

    def features(texts: Any) -> Any:
        given = real([PROMPT])
        if list(texts) != ["nothing"]:
            return given
        return type(given)(pipe.transformer.without_text(given.mask), given.mask)

    monkeypatch.setattr(pipe, "_features", features)
    found = pipe(PROMPT, seed=3, negative_prompt="nothing", output_type="latent").images
    assert torch.equal(found, plain)


def t5(width: int = 16) -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0), ("!", -2.0), ("▁A", -2.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5EncoderModel(config).eval(), T5Tokenizer(vocab=pieces, extra_ids=0)


@cache
def with_t5() -> InfinityPipeline:
    encoder, tokenizer = t5()
    return own_pipeline(SCALES, text_encoder=encoder, tokenizer=tokenizer)


@torch.no_grad()
def test_features_of_t5() -> None:
    """Of prompts as they are, end of text included, in float32, as many positions as the longest has."""
    pipe = with_t5()
    texts = ["A red sphere!", "a cube"]
    assert pipe.tokenizer.tokenize(texts[0]) == ["▁A", "▁red", "▁sphere", "!"], "no caption cleaner"
    given = pipe._condition(list(texts))
    assert given.values.shape == (2, 5, 16)
    assert given.values.dtype == torch.float32
    assert given.mask is not None
    assert given.mask.tolist() == [[True] * 5, [False, False, True, True, True]]
    for row, text in enumerate(texts):
        ids = pipe.tokenizer(text, return_tensors="pt")["input_ids"]
        assert pipe.tokenizer.convert_ids_to_tokens(ids[0])[-1] == "</s>"
        alone = pipe.text_encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(given.values[row, -len(alone) :], alone, atol=1e-5, rtol=0)
        assert not given.values[row, : 5 - len(alone)].any()
    assert len(pipe._condition(["a red cube " * 9]).values[0]) == 8, "cut to what the model can be guided by"


def test_features_of_half_precision_encoders_become_float32() -> None:
    encoder, tokenizer = t5()
    pipe = own_pipeline(SCALES, text_encoder=encoder.to(torch.bfloat16), tokenizer=tokenizer)
    assert pipe._condition(["a cube"]).values.dtype == torch.float32


def test_prompts_are_not_cleaned() -> None:
    pipe = with_t5()
    images = [
        pipe(text, seed=3, output_type="latent").images
        for text in ("a red cube", "A red cube", "a red cube!")
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


# -- components ----------------------------------------------------------------------------------------


def test_components_must_fit() -> None:
    encoder, tokenizer = t5(width=24)
    with refused("reads text features of 16 numbers but the text encoder makes 24"):
        own_pipeline(SCALES, text_encoder=encoder, tokenizer=tokenizer)
    with refused("predicts 4 bits per token but the image tokenizer has 5"):
        own_pipeline(SCALES, vq_model=bitwise_vq(bits=5))
    with refused("predicts 4 bits per token but the image tokenizer has 16"):
        own_pipeline(SCALES, vq_model=bitwise_vq(patchify=2))
    with refused("numbers per token 5 instead of 4"):
        own_pipeline(SCALES, refiner=infinity_transformer(token_bits=5))
    with refused("instead of"):
        own_pipeline(SCALES, refiner=var_transformer("caption"))
    with refused("text_encoder"):
        own_pipeline(SCALES, text_encoder=None)


def test_half_precision() -> None:
    pipe: Any = new_pipeline("infinity").to(torch.bfloat16)
    for accelerator in (None, "code", "refiner"):
        out = pipe(PROMPTS["infinity"], seed=0, accelerator=accelerator)
        assert out.stats.dtype == "bfloat16"
        assert [p.size for p in out.images] == [(6, 6)] * 3
        assert (out.written > 0).all()


# -- editing -------------------------------------------------------------------------------------------

WIDE = ((1, 1), (2, 3), (4, 6))


@cache
def wide_pipeline() -> InfinityPipeline:
    """Images of 8 x 12 pixels."""
    return own_pipeline(WIDE)


def source_image() -> Image.Image:
    pixels = torch.randint(256, (8, 12, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def right_third() -> Tensor:
    mask = torch.zeros(8, 12)
    mask[:, 8:] = 1
    return mask


KEPT = torch.tensor([True] + [True, True, False] * 2 + [True, True, True, True, False, False] * 4)


@torch.no_grad()
@pytest.mark.parametrize("accelerator", [None, "code", "refiner"])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_inpainting_where_images_are_no_squares(accelerator: str | None, prompt: str | None) -> None:
    pipe = wide_pipeline()
    assert torch.equal(kept_tokens(right_third(), pipe.schedule), KEPT)
    source = pipe.vq_model.encode_tokens(image_tensor(source_image(), (8, 12)), pipe.schedule)

    def painted(**options: Any) -> Any:
        return pipe.inpaint(source_image(), right_third(), prompt, accelerator=accelerator, **options)

    drawn = painted(seed=1, num_images=2, output_type="latent")
    assert torch.equal(drawn.images[:, KEPT], source[:, KEPT].expand(2, -1))
    assert not torch.equal(drawn.images[0, ~KEPT], drawn.images[1, ~KEPT])
    assert drawn.stats.rows == (4 if prompt else 2)
    assert torch.equal(painted(seed=2, output_type="latent").images[0], drawn.images[1])
    assert [p.size for p in painted(seed=1).images] == [(12, 8)]


@torch.no_grad()
def test_inpainting_without_a_prompt_reads_all_null_features() -> None:
    pipe = wide_pipeline()
    options: dict[str, Any] = {"temperature": 0.0, "output_type": "latent"}
    tokens = pipe.inpaint(source_image(), right_third(), guidance_scale=10.0, **options).images
    network = pipe.transformer
    null = network.cfg_uncond.unsqueeze(0)
    inputs = pipe.vq_model.quantizer(pipe.schedule).inputs(tokens)
    likelier = network(null, inputs, pipe.schedule).unflatten(-1, (-1, 2)).argmax(-1)
    assert torch.equal(unpack_bits(tokens, 4).long()[:, ~KEPT], likelier[:, ~KEPT])
    with refused("needs a prompt"):
        pipe.inpaint(source_image(), right_third(), negative_prompt="cube")
    guided = pipe.inpaint(source_image(), right_third(), PROMPT, **options).images
    against = pipe.inpaint(source_image(), right_third(), PROMPT, negative_prompt="sphere", **options).images
    assert not torch.equal(guided, against)


@torch.no_grad()
def test_outpainting_at_a_size_of_the_call() -> None:
    pipe = own_pipeline(None, height=32, width=32)
    out = pipe.outpaint(source_image(), (0, 0, 20, 20), PROMPT, ratio="4:3", seed=0)
    down, across = infinity_schedule("0.75", "0.06M").last_grid
    assert out.images[0].size == (2 * across, 2 * down)
    with refused("the box must lie within 0 to"):
        pipe.outpaint(source_image(), (0, 0, 20, 3000), PROMPT)


# -- what a call returns and shows ---------------------------------------------------------------------


@torch.no_grad()
def test_output_types() -> None:
    pipe: Any = pipeline("infinity")
    tensor = pipe(PROMPTS["infinity"], seed=1, output_type="pt").images
    array = pipe(PROMPTS["infinity"], seed=1, output_type="np").images
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    tokens, stats = pipe(PROMPTS["infinity"], seed=1, output_type="latent", return_dict=False)
    assert tokens.shape == (3, TOKENS)
    assert tokens.dtype == torch.int64
    assert stats.tokens == TOKENS
    shown = pipe.vq_model.decode_tokens(tokens, pipe.schedule).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(tensor, shown, atol=1e-5, rtol=0)


@pytest.mark.parametrize("accelerator", [None, CoDe(draft_scales=1)], ids=["plain", "code"])
def test_previews_and_stopping(accelerator: Any) -> None:
    pipe: Any = new_pipeline("infinity")
    seen, previews = [], []

    def look(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        seen.append((step, tokens))
        previews.append(state["preview"]()[0].tobytes())

    whole = pipe(PROMPT, seed=3, accelerator=accelerator, callback_on_step_end=look)
    assert seen == [(0, 1), (1, 4), (2, 9)]
    assert previews[-1] == whole.images[0].tobytes()
    assert len(set(previews)) == 3

    def stop(pipe: Any, step: int, tokens: int, state: dict[str, Any]) -> None:
        pipe._interrupt = step == 1

    stopped = pipe(PROMPT, seed=3, accelerator=accelerator, callback_on_step_end=stop)
    assert stopped.stats.interrupted
    assert stopped.images[0].tobytes() == previews[1]


# -- saving and loading --------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    """With a real text encoder."""
    pipe = with_t5()
    pipe.save_pretrained(tmp_path)
    for loader in (InfinityPipeline, AutoPipeline):
        loaded = quiet(loader.from_pretrained(tmp_path))
        assert isinstance(loaded, InfinityPipeline)
        assert loaded.schedule == SCHEDULE
        assert len(loaded.refiner.blocks) == 2
        for accelerator in (None, "code"):
            options = {"seed": 0, "accelerator": accelerator, "output_type": "pt"}
            assert torch.equal(loaded(PROMPT, **options).images, pipe(PROMPT, **options).images)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


class Hub:
    """Stands for the hub: published names lead to tiny files in the published layout."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]

    def download(self, repository: str, name: str, **_: Any) -> str:
        self.asked.append((repository, name))
        return str(self.folder / name)

    def snapshot(self, repository: str, *, allow_patterns: str, **_: Any) -> str:
        self.asked.append((repository, allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = tmp_path / "hub"
    weights = folder / "infinity_8b_weights"
    weights.mkdir(parents=True)
    torch.save(golden("inf_base"), folder / "infinity_2b_reg.pth")
    torch.save({"vae": golden("vae_a")}, folder / "infinity_vae_d32reg.pth")
    torch.save({"vae": golden("vae_p")}, folder / "infinity_vae_d56_f8_14_patchify.pth")
    state = golden("inf_patchify")
    names = sorted(state)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, weights / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    found = Hub(folder)
    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", found.download)
    monkeypatch.setattr("varaccel.pipelines.published.snapshot_download", found.snapshot)
    return found


MODELS = {
    "infinity-2b": ("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", 128, 0.5, 1),
    "infinity-8b": ("infinity_8b_weights/", "infinity_vae_d56_f8_14_patchify.pth", 256, 1.0, 2),
}
"""Files, width of the text features of the tiny ones, temperature, patches."""


@pytest.mark.parametrize("name", MODELS)
def test_published_models_by_name(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, tokenizer, width, temperature, patchify = MODELS[name]
    encoder, words = t5(width)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", lambda *_, dtype, **__: encoder.to(dtype))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: words)
    pipe = quiet(AutoPipeline.from_pretrained(name, height=256, width=256, dtype=torch.bfloat16))
    assert isinstance(pipe, InfinityPipeline)
    repository = "FoundationVision/Infinity"
    asked = f"{weights}*" if weights.endswith("/") else weights
    assert sorted(hub.asked) == sorted([(repository, asked), (repository, tokenizer)])
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vq_model.dtype == torch.float32
    assert pipe.vq_model.config.patchify == patchify
    settings = pipe.config
    assert (settings.guidance_scale, settings.top_p, settings.temperature) == (3.0, 0.97, temperature)


@pytest.mark.parametrize("name", MODELS)
def test_single_files(name: str, hub: Hub, tmp_path: Path) -> None:
    """Tokenizers of the tests have four pixels per token, so a ratio of one has 64 pixels of seven scales."""
    weights, tokenizer, width, _, patchify = MODELS[name]
    encoder, words = t5(width)
    settings: dict[str, Any] = {"text_encoder": encoder, "tokenizer": words, "height": 64, "width": 64}
    path, vq_model = hub.folder / weights, hub.folder / tokenizer
    pipe = quiet(InfinityPipeline.from_single_file(path, vq_model=vq_model, refiner=path, **settings))
    assert pipe.vq_model.config.patchify == patchify
    assert pipe.config.guidance_scale == 3.0
    out = pipe("a red cube", seed=0, accelerator=CoDe(draft_scales=5))
    assert out.images[0].size == (64, 64)
    given = quiet(
        InfinityPipeline.from_single_file(path, vq_model=pipe.vq_model, refiner=pipe.refiner, **settings)
    )
    again = given("a red cube", seed=0, accelerator=CoDe(draft_scales=5))
    assert again.images[0].tobytes() == out.images[0].tobytes()
    pipe.save_pretrained(tmp_path / "saved")
    saved = quiet(AutoPipeline.from_pretrained(tmp_path / "saved"))
    assert saved("a red cube", seed=0, accelerator=CoDe(draft_scales=5)).images[0].tobytes() == (
        out.images[0].tobytes()
    )


def test_files_that_do_not_fit(hub: Hub) -> None:
    tokens = hub.folder / "infinity_vae_d32reg.pth"
    with refused("holds no 'cfg_uncond'.*another kind of model", CheckpointError):
        InfinityPipeline.from_single_file(tokens, vq_model=tokens)
    lost = hub.folder / "infinity_8b_weights"
    (lost / "two.safetensors").unlink()
    with refused(r"lacks two\.safetensors", CheckpointError):
        InfinityPipeline.from_single_file(lost, vq_model=tokens)
    with refused("predicts 16 bits per token but the image tokenizer has 4"):
        encoder, words = t5(128)
        vq = bitwise_vq()
        InfinityPipeline.from_single_file(
            hub.folder / "infinity_2b_reg.pth", vq_model=vq, text_encoder=encoder, tokenizer=words
        )
    with refused("height", InputError):
        encoder, words = t5(128)
        InfinityPipeline.from_single_file(
            hub.folder / "infinity_2b_reg.pth",
            vq_model=tokens,
            text_encoder=encoder,
            tokenizer=words,
            hight=256,
        )


def test_a_pipeline_without_a_refiner() -> None:
    pipe = quiet(new_infinity_pipeline())
    pipe.register_modules(refiner=None)
    with refused("without a refiner"):
        pipe(PROMPT, accelerator="code")
