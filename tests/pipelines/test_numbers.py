"""Numbers that come into a call, and numbers that go wrong inside it, in every family."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.tiny import PROMPTS, drafting_pipeline, told
from varaccel import CSpD, Jacobi, Lantern, Speculative, ZipAR
from varaccel.accelerators import ACCELERATORS, AnyAccelerator, fitting
from varaccel.engine.options import as_integer, as_number
from varaccel.engine.randomness import Randomness, image_generators
from varaccel.errors import InputError, NumberError
from varaccel.nn import devices
from varaccel.pipelines.causal import CausalPipeline
from varaccel.pipelines.class_names import find_class

KINDS = ("c2i", "var-class", "infinity", "mar-class")
OF_CLASSES = ("c2i", "var-class", "mar-class")
OF_PROMPTS = ("t2i", "var-caption", "infinity", "mar-caption")
CATEGORICAL = KINDS[:3]


def latents(pipe: Any, prompt: Any = None, **options: Any) -> torch.Tensor:
    """Of a prompt, or of a class whatever a pipeline is told."""
    return pipe(
        told(pipe, 1) if prompt is None else prompt, **{"seed": 0, **options}, output_type="latent"
    ).images


# -- seeds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_seed_counts(kind: str) -> None:
    pipe = tiny.pipeline(kind)
    seeds = [0, 5, *(5 + (1 << bit) for bit in (3, 31, 32, 33, 47, 61, 62)), 2**63 - 1]
    drawn = [latents(pipe, seed=seed) for seed in seeds]
    for index, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:index]), seeds[index]


def test_streams_of_seeds_that_differ_in_high_bits_have_nothing_in_common() -> None:
    numbers = [
        torch.rand(20_000, dtype=torch.float64, generator=image_generators(1, 7 + (high << 32))[0])
        for high in (0, 1, 2, 2**30)
    ]
    assert len(torch.cat(numbers).unique()) == 80_000
    for one in numbers[1:]:  # uniform, and not correlated with the first
        assert abs(float(one.mean()) - 0.5) < 0.01
        assert abs(float(torch.corrcoef(torch.stack([numbers[0], one]))[0, 1])) < 0.04


def test_small_seeds_are_those_of_torch() -> None:
    for seed in (0, 1, 2**32 - 1):
        expected = torch.rand(5, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.rand(5, generator=image_generators(1, seed)[0]), expected)


def test_images_of_one_generator_do_not_share_streams() -> None:
    """Of 50,000 seeds of 32 bits a pair would be equal with a chance of a quarter; ten such runs, with 95 percent."""
    for seed in range(10):
        draws = torch.randint(2**62, (50_000,), generator=torch.Generator().manual_seed(seed))
        low = draws & 0xFFFFFFFF
        order = low.argsort()
        twins = (low[order][1:] == low[order][:-1]).nonzero().flatten()
        if len(twins):
            pair = [int(draws[order[twins[0] + i]]) for i in (0, 1)]
            one, other = (torch.rand(3, generator=image_generators(1, seed)[0]) for seed in pair)
            assert not torch.equal(one, other)
            return
    pytest.fail("no pair of seeds shares its low bits; take other generators")


def test_inner_seeds_count_in_full() -> None:
    """What the images' generators seed: streams of speculation, noise, orders."""
    uniforms = torch.zeros(2, 4, dtype=torch.float64)
    twins = Randomness(uniforms, (9, 9 + 2**32), (11, 11 + 2**40))
    numbers = twins.stream(3).next()
    assert not torch.equal(numbers[0], numbers[1])
    noise = twins.gumbel(5).at(torch.zeros(2, 1, dtype=torch.int64))
    assert not torch.equal(noise[0], noise[1])


def test_noise_that_is_not_aligned_shares_no_number() -> None:
    from varaccel.hosts.masked.noise import TokenNoise

    for tokens in (256, 64):
        own = TokenNoise.draw(image_generators(1, 0), tokens, 16, torch.device("cpu"))
        other = own.other()
        steps = own.steps(20)
        for theirs in (other.start, other.steps(20)):
            assert (
                float(torch.isin(theirs, steps).float().mean()) < 0.05
            )  # float32 has equal numbers by chance
        assert float(torch.isin(other.start, own.start).float().mean()) < 0.01


@pytest.mark.parametrize(
    "seed",
    [
        -1,
        2**63,
        1.0,
        1.5,
        True,
        "3",
        None,
        [1],
        math.nan,
        torch.tensor(1.0),
        np.float64(2),
        torch.tensor([1, 2]),
    ],
)
def test_bad_seeds(seed: Any) -> None:
    if seed is None:
        assert len(image_generators(2, None)) == 2
        return
    with pytest.raises(InputError, match="seed must be an integer from 0 to"):
        image_generators(1, seed)


def test_the_last_seed_is_one() -> None:
    assert len(image_generators(1, 2**63 - 1)) == 1
    with pytest.raises(InputError, match="seeds end at"):
        image_generators(2, 2**63 - 1)


@pytest.mark.parametrize("generator", [3, "x", [None], [0], (torch.Generator(), 3)])
def test_bad_generators(generator: Any) -> None:
    count = len(generator) if isinstance(generator, (list, tuple)) else 1
    with pytest.raises(InputError, match=r"torch\.Generator"):
        image_generators(count, generator=generator)


# -- other libraries' numbers ---------------------------------------------------------------------------

INTEGERS: list[Callable[[int], Any]] = [np.int64, np.uint8, np.int32, torch.tensor, np.array]


@pytest.mark.parametrize("kind", OF_CLASSES)
@pytest.mark.parametrize("made", INTEGERS)
def test_integers_of_other_libraries(kind: str, made: Callable[[int], Any]) -> None:
    pipe = tiny.pipeline(kind)
    expected = latents(pipe, 2, seed=3, num_images_per_prompt=2)
    assert torch.equal(latents(pipe, made(2), seed=made(3), num_images_per_prompt=made(2)), expected)
    several = latents(pipe, [1, 2], seed=3)
    assert torch.equal(latents(pipe, [made(1), made(2)], seed=3), several)
    assert torch.equal(latents(pipe, np.array([1, 2]), seed=3), several)
    assert torch.equal(latents(pipe, torch.tensor([1, 2]), seed=3), several)


@pytest.mark.parametrize("made", [np.float32, np.float64, torch.tensor, lambda x: np.array(x)])
def test_numbers_of_other_libraries(made: Callable[[float], Any]) -> None:
    for kind in KINDS:
        pipe = tiny.pipeline(kind)
        options = {"temperature": 0.5, "guidance_scale": 2.5}
        assert torch.equal(
            latents(pipe, **{name: made(value) for name, value in options.items()}), latents(pipe, **options)
        )
    for kind in CATEGORICAL:
        options = {"top_k": np.int64(3), "top_p": made(0.5)}
        assert torch.equal(
            latents(tiny.pipeline(kind), **options), latents(tiny.pipeline(kind), top_k=3, top_p=0.5)
        )
    assert Jacobi(window=np.int64(4)) == Jacobi(window=4)
    assert type(Jacobi(window=np.int64(4)).window) is int  # reports are JSON
    assert Lantern(k=np.int32(5), delta=made(0.25)) == Lantern(k=5, delta=0.25)
    assert CSpD(prefill=made(0.25), draft_length=torch.tensor(2)) == CSpD(prefill=0.25, draft_length=2)
    per_scale: Any = np.array([1.0, 0.5, 0.0])
    var = tiny.pipeline("var-class")
    assert torch.equal(latents(var, temperature=per_scale), latents(var, temperature=[1.0, 0.5, 0.0]))


def test_what_is_no_integer_or_number() -> None:
    for value in (
        True,
        np.True_,
        torch.tensor(True),
        1.0,
        np.float32(1),
        "1",
        None,
        [1],
        torch.tensor([1, 2]),
        b"1",
    ):
        assert as_integer(value) is None, repr(value)
    for value in (
        True,
        np.True_,
        torch.tensor(True),
        "1",
        None,
        [1.0],
        torch.ones(2),
        1j,
        math.nan,
        math.inf,
        10**400,
    ):
        assert as_number(value) is None, repr(value)
    assert as_number(3) == 3
    assert type(as_number(np.float32(0.5))) is float


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["temperature", "guidance_scale", "top_p", "top_k", "guidance_interval"])
def test_wrong_types_are_one_sentence(kind: str, name: str) -> None:
    pipe = tiny.pipeline(kind)
    if name not in inspect.signature(type(pipe).__call__).parameters:
        return
    wrong: list[Any] = ["warm", "1", True, {}, object(), math.nan, math.inf, 1e39, -2, 1j]
    wrong += [2.5, np.float32(2)] if name in ("top_k", "guidance_interval") else [10**400]
    if kind not in ("var-class", "infinity") or name not in ("temperature", "top_k"):
        wrong += [[1.0], np.ones(2)]
    if name == "guidance_scale" and isinstance(pipe, CausalPipeline):  # one for each branch but the last
        wrong.remove([1.0])
        wrong += [[], ["1"], [[1.0]], [math.nan], [2.0, 3.0]]
    for value in wrong:
        with pytest.raises(InputError, match=name) as error:
            latents(pipe, **{name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 250


@pytest.mark.parametrize("kind", KINDS)
def test_limits_are_the_same_in_all_families(kind: str) -> None:
    pipe = tiny.pipeline(kind)
    plain = latents(pipe, guidance_scale=1)
    for off in (0, 0.5, 1.0):
        assert torch.equal(latents(pipe, guidance_scale=off), plain)
    if kind == "mar-class":
        return
    for everything in (
        {"top_k": 0},
        {"top_k": tiny.VOCAB_SIZE},
        {"top_k": 10**9},
        {"top_p": 1},
        {"top_p": 0},
    ):
        assert torch.equal(latents(pipe, guidance_scale=1, **everything), plain), everything
    for bad in ({"top_k": -1}, {"top_p": 1.1}, {"top_p": -0.1}, {"guidance_scale": -1}):
        with pytest.raises(InputError):
            latents(pipe, **bad)


@pytest.mark.parametrize("kind", [*OF_CLASSES, *OF_PROMPTS])
@pytest.mark.parametrize(
    "prompt", [[None], None, {"prompt": "a cube"}, b"a cube", [b"x"], 1.5, [1.5], [["a"]], [{}], object()]
)
def test_what_is_no_prompt(kind: str, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt"):
        tiny.pipeline(kind)(prompt, seed=0)


def test_prompts_of_any_collection() -> None:
    pipe = tiny.pipeline("t2i")
    texts = ["a red sphere", "sphere"]
    expected = latents(pipe, texts)
    for collection in (tuple(texts), iter(texts), np.array(texts), dict.fromkeys(texts).keys()):
        assert torch.equal(latents(pipe, collection), expected)


# -- class names -----------------------------------------------------------------------------------------

ENTRIES = [
    "crane",
    "Cardigan, Cardigan Welsh corgi",
    "cardigan",
    "lesser panda, panda",
    "giant panda, panda",
    "crane",
]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cardigan", 2),
        ("Cardigan,  cardigan welsh corgi", 1),
        ("cardigan welsh corgi", 1),
        ("giant panda", 4),
        ("lesser panda, panda", 3),
    ],
)
def test_a_name_that_means_one_class(name: str, label: int, caplog: pytest.LogCaptureFixture) -> None:
    assert find_class(name, ENTRIES, 6) == label
    assert ("may also mean 1 (Cardigan" in caplog.text) == (name == "cardigan")


@pytest.mark.parametrize(
    ("name", "both"), [("panda", ["3 (lesser", "4 (giant"]), ("Crane", ["0 (crane)", "5 (crane)"])]
)
def test_a_name_that_means_two(name: str, both: list[str]) -> None:
    with pytest.raises(InputError, match="several classes") as error:
        find_class(name, ENTRIES, 6)
    assert all(part in str(error.value) for part in both)


def test_every_entry_of_imagenet_can_be_asked_for() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    entries = [info.index_to_description(label) for label in range(1000)]
    twice = {entry for entry in entries if entries.count(entry) > 1}
    for label, entry in enumerate(entries):
        if entry not in twice:
            assert find_class(entry, entries, 1000) == label
    for name in ("panda", "wagon", "horn", "crane"):
        with pytest.raises(InputError, match="several classes"):
            find_class(name, entries, 1000)


# -- numbers that are none -------------------------------------------------------------------------------


def spoil(network: nn.Module, *names: str, value: float = math.nan) -> None:
    found = [parameter for name, parameter in network.named_parameters() if name in names]
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter.fill_(value)


def spoil_all(pipe: Any) -> None:
    """NaN in what every network of a pipeline gives, whichever of them an accelerator asks."""
    names = ("norm.weight", "head.weight", "decoder_norm.weight")
    for network in (
        pipe.transformer,
        *(d for d in pipe.drafters.values() if d is not pipe.components.get("eagle_head")),
    ):
        spoil(network, *names)


OUTPUTS = {
    "c2i": "norm.weight",
    "var-class": "head.weight",
    "infinity": "head.weight",
    "mar-class": "decoder_norm.weight",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_gives_no_numbers(kind: str, temperature: float, value: float) -> None:
    if kind == "mar-class" and temperature == 0:
        return  # a diffusion head has no greedy mode
    pipe = tiny.new_pipeline(kind)
    spoil(pipe.transformer, OUTPUTS[kind], value=value)
    name = type(pipe.transformer).__name__
    with pytest.raises(NumberError, match=rf"^{name} gave NaN or infinity in float32 in pass 1: .*\.$"):
        pipe(told(pipe, 1), seed=0, temperature=temperature)


@pytest.mark.parametrize("kind", KINDS)
def test_every_accelerator_notices(kind: str) -> None:
    for name in fitting(type(tiny.pipeline(kind)).job_type):
        pipe: Any = drafting_pipeline_of(kind)
        spoil_all(pipe)
        with pytest.raises(NumberError, match="NaN"):
            pipe(told(pipe, 1), seed=0, accelerator=name)


def drafting_pipeline_of(kind: str) -> Any:
    if kind != "c2i":
        pipe: Any = tiny.new_pipeline(kind)
        if kind == "var-class" and pipe.refiner is None:
            pipe.register_modules(refiner=tiny.var_transformer("class", 1))
    else:
        pipe = type(drafting_pipeline("c2i")).from_pipe(
            tiny.new_pipeline("c2i"), draft_transformer=tiny.transformer("c2i", 1)
        )
        pipe.register_modules(eagle_head=tiny.eagle_head(pipe.transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("kind", "part", "parameter", "accelerator", "source"),
    [
        ("c2i", "draft_transformer", "norm.weight", Speculative(drafter="small"), "LlamaGenTransformer"),
        ("c2i", "eagle_head", None, Speculative(drafter="eagle"), "EagleHead"),
        ("var-class", "refiner", "head.weight", ACCELERATORS["code"](), "VARTransformer"),
        ("mar-class", "draft_transformer", "decoder_norm.weight", CSpD(), "MARTransformer"),
        ("mar-class", "transformer", "diffloss.net.final_layer.linear.bias", None, "DiffusionHead"),
    ],
)
def test_any_network_of_a_call_is_named(
    kind: str, part: str, parameter: str | None, accelerator: AnyAccelerator | None, source: str
) -> None:
    pipe = drafting_pipeline_of(kind)
    network = getattr(pipe, part)
    names = [parameter] if parameter else [name for name, _ in network.named_parameters()]
    spoil(network, *names)
    with pytest.raises(NumberError, match=rf"^{source} gave NaN or infinity in float32 in pass \d+"):
        pipe(told(pipe, 1), seed=0, accelerator=accelerator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "raw"])
def test_an_image_tokenizer_that_gives_no_numbers(kind: str, output_type: str) -> None:
    pipe: Any = tiny.new_pipeline(kind)
    with torch.no_grad():
        list(pipe.image_tokenizer.decoder.parameters())[-1].fill_(math.nan)
    name = type(pipe.image_tokenizer).__name__
    with pytest.raises(NumberError, match=f"^{name} gave NaN or infinity in float32 as pixels"):
        pipe(told(pipe, 1), seed=0, output_type=output_type)


@pytest.mark.parametrize("kind", OF_PROMPTS)
def test_a_text_encoder_that_gives_no_numbers(kind: str) -> None:
    pipe: Any = tiny.new_pipeline(kind)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(NumberError, match=r"^WordTextEncoder gave NaN or infinity in float32 as features"):
        pipe("a red cube", seed=0)


def test_half_precision_that_overflows_is_told_with_the_way_out() -> None:
    pipe: Any = tiny.new_pipeline("var-class")
    spoil(pipe.transformer, "head.weight", value=6e4)
    pipe.transformer.to(torch.float16)
    with pytest.raises(NumberError, match=r"in float16 in pass \d: load it in bfloat16 or float32"):
        pipe(told(pipe, 1), seed=0)


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_small_temperatures_take_the_likeliest(kind: str) -> None:
    pipe = tiny.pipeline(kind)
    likeliest = latents(pipe, temperature=0)
    for temperature in (1e-7, 1e-40, 5e-324):
        assert torch.equal(latents(pipe, temperature=temperature), likeliest)


def test_guidance_that_overflows_is_told() -> None:
    for kind in CATEGORICAL:
        with pytest.raises(NumberError, match="guidance_scale"):
            tiny.pipeline(kind)(told(tiny.pipeline(kind), 1), seed=0, guidance_scale=3e38)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_are_not_waited_for_tell_at_the_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a device whose results come later: the call runs on, and ends with the first pass that was broken."""
    monkeypatch.setattr("varaccel.nn.number_check.is_host", lambda device: False)
    for name in fitting(type(tiny.pipeline(kind)).job_type):
        pipe = drafting_pipeline_of(kind)
        spoil_all(pipe)
        with pytest.raises(NumberError, match="in pass 1:"):
            pipe(told(pipe, 1), seed=0, accelerator=name)


# -- torch's defaults, and devices without float64 --------------------------------------------------------

CALLS: list[tuple[str, AnyAccelerator | str | None]] = [
    *((kind, name) for kind in KINDS for name in fitting(type(tiny.pipeline(kind)).job_type)),
    *(("c2i", Speculative(drafter=drafter)) for drafter in ("small", "eagle")),
    ("c2i", Jacobi(coupling="maximal")),
    ("c2i", ZipAR(window=2, mode="published")),
    ("mar-class", CSpD(mode="paper")),
    ("mar-class", CSpD(aligned=False)),
]


@contextmanager
def torch_defaults(dtype: torch.dtype, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    if device is not None:
        torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "accelerator"), CALLS, ids=str)
def test_torch_defaults_change_no_image(kind: str, accelerator: AnyAccelerator | str | None) -> None:
    """Whatever is created says its type and device: "meta" holds no numbers, so that nothing can come from there."""
    pipe = drafting_pipeline_of(kind)
    expected = latents(pipe, [told(pipe, 1), told(pipe, 2)], accelerator=accelerator)
    with torch_defaults(torch.float64, "meta"):
        drawn = latents(pipe, [told(pipe, 1), told(pipe, 2)], accelerator=accelerator)
    assert drawn.dtype == expected.dtype
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("kind", [*OF_CLASSES, *OF_PROMPTS])
def test_torch_defaults_change_no_pixel(kind: str) -> None:
    """From the prompt to pixels. The device stays: setting it makes torch's own transformer layers take a slower path,
    whose last digits differ."""
    pipe = tiny.pipeline(kind)
    prompt = PROMPTS[kind][0]
    expected = pipe(prompt, seed=0, output_type="np").images
    with torch_defaults(torch.float64):
        drawn = pipe(prompt, seed=0, output_type="np").images
    assert drawn.dtype == expected.dtype
    assert np.array_equal(drawn, expected)


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64: only generators, which are on the CPU, may give such numbers."""

    DRAWS = ("aten.rand.generator", "aten.randn.generator", "aten.rand", "aten.randn", "aten.clamp")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert str(func).startswith(self.DRAWS), f"{func} gives float64"
        return result


@pytest.mark.parametrize(("kind", "accelerator"), CALLS, ids=str)
def test_devices_without_float64(
    kind: str, accelerator: AnyAccelerator | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = drafting_pipeline_of(kind)
    expected = latents(
        pipe, [told(pipe, 1), told(pipe, 2)], accelerator=accelerator
    )  # also makes the tables that are made on the CPU
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    with NoFloat64():
        drawn = latents(pipe, [told(pipe, 1), told(pipe, 2)], accelerator=accelerator)
    assert drawn.shape == expected.shape
    if not drawn.is_floating_point():  # a token changes where its number falls between two roundings
        assert (drawn == expected).float().mean() > 0.9


def test_numbers_in_float32_stay_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **options: torch.full(shape, 1 - 2.0**-53, dtype=torch.float64)
    )
    numbers = Randomness.draw(image_generators(1, 0), 4).uniforms
    assert numbers.dtype == torch.float32
    assert (numbers < 1).all()
