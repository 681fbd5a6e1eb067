"""Code and commands of the page draw the very images that they stand for."""

from __future__ import annotations

import ast
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import varaccel
from tests.tiny import pipeline
from varaccel import AutoPipeline, ZipAR, make_accelerator
from varaccel.__main__ import command_line
from varaccel.accelerators import ACCELERATORS
from varaccel.app.snippet import DrawRequest, given_options, reproduce_command, reproduce_python
from varaccel.engine.job import Job
from varaccel.engine.option_text import parse_options
from varaccel.errors import InputError
from varaccel.hosts.causal.job import CausalJob
from varaccel.hosts.masked.job import MaskedJob
from varaccel.hosts.next_scale.job import ScaleJob
from varaccel.pipelines import placement

OPTIONS: dict[str, dict[str, Any]] = {
    "jacobi": {"window": 3, "coupling": "maximal"},
    "speculative": {"drafter": "layers", "tree": [[0], [1], [0, 0]]},
    "lantern": {"k": 3, "delta": 0.4, "tree": 3},
    "zipar": {"window": 2},
    "code": {"draft_scales": 2, "refiner_top_k": 5},
    "fewer_steps": {"iterations": 3, "head_sampler": "dpm++"},
    "feature_cache": {"refresh": 2, "keep_unconditional": False},
    "cspd": {"draft_length": 2, "inner_temperature": None},
}
CALLS: dict[type[Job], dict[str, Any]] = {
    CausalJob: {"temperature": 0.9, "top_k": 7},
    ScaleJob: {"top_p": 0.9, "temperature": None},
    MaskedJob: {"num_iterations": 5, "head_steps": 4},
}
PROMPTS = {
    "t2i": "a red sphere left of a cube",
    "caption": "a red sphere",
    "c2i": "goldfish",
    "class": "3",
    "infinity": "a red cube",
}
CASES = [
    (name, kind)
    for name, cls in ACCELERATORS.items()
    for job_type, kinds in {
        CausalJob: ("t2i", "c2i"),
        ScaleJob: ("var-caption", "var-class", "infinity"),
        MaskedJob: ("mar-caption", "mar-class"),
    }.items()
    if issubclass(job_type, cls.job_type)
    for kind in kinds
]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def images(folder: Path) -> dict[str, bytes]:
    """The pixels of every image in a folder."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            found[path.name] = image.convert("RGB").tobytes()
    return found


def run_python(code: str, monkeypatch: pytest.MonkeyPatch, model: str, pipe: Any) -> None:
    def from_pretrained(name: str) -> Any:
        assert name == model
        return pipe

    monkeypatch.setattr(AutoPipeline, "from_pretrained", from_pretrained)
    exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})


def run_command(command: str, monkeypatch: pytest.MonkeyPatch, model: str, pipe: Any) -> str:
    def opened(name: str, *, quiet: bool = False) -> Any:
        assert name == model
        return pipe

    monkeypatch.setattr(placement, "open_pipeline", opened)
    program, *words = shlex.split(command)
    assert program == "varaccel"
    result = CliRunner().invoke(command_line, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_both_draw_the_images_of_the_request(
    name: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe, prompt = pipeline(kind), PROMPTS[kind.rpartition("-")[2]]
    options, call = OPTIONS.get(name, {}), CALLS[pipe.job_type]
    request = DrawRequest("the-model", prompt, name, options, 3, 1.5, 2, call)
    expected = pipe(
        prompt,
        seed=3,
        guidance_scale=1.5,
        num_images_per_prompt=2,
        accelerator=make_accelerator(name, options),
        **{key: value for key, value in call.items() if value is not None},
    )
    wanted = {f"image-{i}.png": image.tobytes() for i, image in enumerate(expected.images)}
    assert len(set(wanted.values())) == 2

    run_python(reproduce_python(request), monkeypatch, "the-model", pipe)
    assert images(tmp_path) == wanted
    assert f"{expected.stats.label}: 2 images" in capsys.readouterr().out
    for path in tmp_path.glob("*.png"):
        path.unlink()

    told = run_command(reproduce_command(request), monkeypatch, "the-model", pipe)
    assert expected.stats.label in told
    drawn = images(tmp_path)
    assert drawn.pop("image.png"), "the sheet of both"
    assert drawn == wanted

    output = pipe(**request.pipeline_call())
    assert [image.tobytes() for image in output.images] == list(wanted.values())


def test_one_image_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = DrawRequest("m", "a red sphere", "zipar", {"window": 2}, seed=5)
    expected = pipeline("t2i")("a red sphere", seed=5, accelerator=ZipAR(2)).images[0].tobytes()
    run_python(reproduce_python(request), monkeypatch, "m", pipeline("t2i"))
    assert images(tmp_path) == {"image.png": expected}
    (tmp_path / "image.png").unlink()
    run_command(reproduce_command(request), monkeypatch, "m", pipeline("t2i"))
    assert images(tmp_path) == {"image.png": expected}


@pytest.mark.parametrize("name", ACCELERATORS)
def test_the_code_names_the_public_class(name: str) -> None:
    public = {
        cls.__name__
        for cls in ACCELERATORS.values()
        if getattr(varaccel, cls.__name__, None) is cls and cls.__name__ in varaccel.__all__
    }
    code = reproduce_python(DrawRequest("mini-var", "a cube", name, OPTIONS.get(name, {})))
    expected = ACCELERATORS[name].__name__
    imports = next(node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom))
    assert {alias.name for alias in imports.names} == {
        "AutoPipeline",
        expected if expected in public else "make_accelerator",
    }


def test_the_readers_see_plain_code_and_a_plain_command() -> None:
    request = DrawRequest(
        "mini-llamagen", "a red cube", "speculative", {"drafter": "small", "tree": [[0], [1]]}
    )
    assert reproduce_python(request) == (
        "from varaccel import AutoPipeline, Speculative\n"
        "\n"
        'pipe = AutoPipeline.from_pretrained("mini-llamagen")\n'
        "output = pipe(\n"
        '    "a red cube",\n'
        "    seed=0,\n"
        '    accelerator=Speculative(drafter="small", tree=[[0], [1]]),\n'
        ")\n"
        "print(output.stats)\n"
        'output.images[0].save("image.png")\n'
    )
    assert reproduce_command(request) == (
        "varaccel generate 'a red cube' --model mini-llamagen --seed 0 --accelerator speculative "
        "-o drafter=small -o 'tree=[[0], [1]]'"
    )


def test_options_as_they_were_given() -> None:
    assert given_options(ZipAR()) == {}
    tree = {"top_k": 2, "depth": 3, "total": 4}
    chosen = make_accelerator("speculative", {"tree": tree, "verification": "auto"})
    assert given_options(chosen) == {"tree": tree}
    again = replace(DrawRequest("m", "p", "speculative"), options=given_options(chosen)).accelerator_object()
    assert again == chosen


# -- any text, any option ------------------------------------------------------------------------------

LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
"""What a command line can hold."""

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)


@cache
def generate_command() -> click.Command:
    group: Any = typer.main.get_command(command_line)
    return group.commands["generate"]


def as_typed(command: str) -> dict[str, Any]:
    """The parameters that `varaccel generate` sees."""
    program, subcommand, *words = shlex.split(command)
    assert (program, subcommand) == ("varaccel", "generate")
    return generate_command().make_context("generate", words).params


# the refiner of CoDe takes anything until a model is there
@settings(deadline=None, max_examples=150)
@given(
    st.one_of(LETTERS, LETTERS.map("-{}".format), LETTERS.map("--{}".format)),
    VALUES,
    st.integers(0, 2**63 - 1),
    st.integers(1, 9),
    st.none() | st.floats(allow_nan=False),
)
def test_the_command_parses_back(
    prompt: str, value: Any, seed: int, count: int, guidance: float | None
) -> None:
    request = DrawRequest("-m 'x'", prompt, "code", {"refiner": value}, seed, guidance, count, {"top_k": 9})
    typed = as_typed(reproduce_command(request))
    assert typed["prompt"] == [prompt]
    assert parse_options(typed["option"]) == {"refiner": value}
    assert (typed["seed"], typed["count"], typed["top_k"]) == (seed, count, 9)
    assert (typed["model"], typed["accelerator"]) == ("-m 'x'", "code")
    assert typed["guidance_scale"] == guidance
    assert typed["separate"] == (count > 1)


@settings(deadline=None, max_examples=150)
@given(st.text(), VALUES, st.integers(0, 2**63 - 1), st.none() | st.floats(allow_nan=False))
def test_the_code_calls_with_the_very_arguments(
    prompt: str, value: Any, seed: int, guidance: float | None
) -> None:
    for name in ("code", "refiner"):  # one by its class, one by its name
        request = DrawRequest("m", prompt, name, {"refiner": value}, seed, guidance)
        called: dict[str, Any] = {}

        def pipe(prompt: str, called: dict[str, Any] = called, **arguments: Any) -> Any:
            called |= {"prompt": prompt, **arguments}
            return SimpleNamespace(stats="", images=[SimpleNamespace(save=lambda name: None)])

        with pytest.MonkeyPatch.context() as patch:
            run_python(reproduce_python(request), patch, "m", pipe)
        assert called.pop("accelerator") == request.accelerator_object()
        assert called == {"prompt": prompt, "seed": seed} | (
            {} if guidance is None else {"guidance_scale": guidance}
        )


@pytest.mark.parametrize("prompt", ["half \ud800 a pair", "a\0b"])
def test_what_no_command_can_hold(prompt: str) -> None:
    request = DrawRequest("m", prompt, "plain")
    with pytest.raises(InputError, match="no command line can hold"):
        reproduce_command(request)
    assert ast.parse(reproduce_python(request))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accelerator": "warp"}, "unknown accelerator"),
        ({"accelerator": "zipar", "options": {"windw": 2}}, "window"),
        ({"accelerator": "zipar", "options": {"window": 0}}, "window must be"),
        ({"accelerator": "code", "options": {"refiner": object()}}, "an? object cannot be written down"),
        ({"call": {"lambda": 1}}, "cannot be an argument"),
        ({"call": {"a=1);print(": 1}}, "cannot be an argument"),
    ],
    ids=["accelerator", "option", "value", "object", "keyword", "code"],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    request = replace(DrawRequest("m", "a cube", "plain"), **change)
    for reproduce in (reproduce_python, reproduce_command):
        with pytest.raises(InputError, match=message):
            reproduce(request)


@pytest.mark.parametrize("call", [{"head_sampler": "ddim"}, {"temperature": [1.0, 0.5]}], ids=str)
def test_the_command_says_what_it_has_no_option_for(call: dict[str, Any]) -> None:
    request = DrawRequest("m", "a cube", "plain", call=call)
    with pytest.raises(InputError, match=f"no option for {next(iter(call))}"):
        reproduce_command(request)
    assert f"{next(iter(call))}=" in reproduce_python(request)


def test_every_option_of_a_call_is_one_of_the_command() -> None:
    from varaccel.app.snippet import COMMAND_OPTIONS

    assert set(COMMAND_OPTIONS) <= {parameter.name for parameter in generate_command().params}
