"""Every code block of the documents: Python runs, command lines parse.

Blocks of one document run in order and share their names, in an empty folder. Names of published models, and files
that only a download would bring, are answered by tiny models of the same family, so that the calls are real. A block
that is no program, such as an excerpt of a loop, is marked ```python {.fragment} and only compiled.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from PIL import Image

from tests import tiny, tiny_glm_image, tiny_transformers
from tests.scripts import ROOT, load_script
from tests.test_layers import DOORS, LAYERS
from varaccel import (
    AutoPipeline,
    EagleHead,
    GlmImagePipeline,
    InfinityPipeline,
    JanusPipeline,
    LlamaGenPipeline,
    MARPipeline,
    MARTransformer,
    VARPipeline,
    VARTransformer,
    VQModel,
)
from varaccel.accelerators import ACCELERATORS
from varaccel.nn.scale_schedule import SCALES_256
from varaccel.pipelines import published
from varaccel.pipelines.base import TokenPipeline
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.shipped import shipped_models
from varaccel.tokenizers.text import WordTokenizer

GENERATED = {"docs/report.md"}
"""Pages that a script writes, without code of their own."""

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if str(path.relative_to(ROOT)) not in GENERATED
)
CARDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "weights").glob("*/README.md"))

REFUSED: tuple[type[BaseException], ...] = (
    typer.BadParameter.__mro__[2],
    ValueError,
    AssertionError,
    SystemExit,
)
"""What a command line that is wrong ends in; the first is the base of click's errors, wherever typer has click from."""

MOST_FRAGMENTS = 2
"""Blocks of one document that are only compiled."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block.

    Attributes:
        language: the first word after the fence, "" without one; "indented" for a block that is indented.
        options: what else stands there.
        text: without the indentation of the block.
        line: of the document, counted from 1, on which the text begins.
    """

    language: str
    options: str
    text: str
    line: int

    @property
    def is_fragment(self) -> bool:
        return ".fragment" in self.options


_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*) *(?P<options>.*)$")
_SNIPPET = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)


def read_blocks(text: str) -> list[Block]:
    """Blocks of a Markdown document in order; files that a page shows by name are filled in."""
    blocks: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence:
            end = number + 1
            while lines[end].strip() != fence["fence"]:
                end += 1
            cut = len(fence["indent"])
            body = "\n".join(line[cut:] for line in lines[number + 1 : end]) + "\n"
            body = _SNIPPET.sub(lambda match: (ROOT / match["path"]).read_text(), body)
            blocks.append(Block(fence["language"], fence["options"], body, number + 2))
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                if _FENCE.match(lines[end]):  # in a tab or an admonition
                    break
                end += 1
            body = "\n".join(line[4:] for line in lines[number:end])
            blocks.append(Block("indented", "", body, number + 1))
            number = end
        else:
            number += 1
    return blocks


def test_blocks_are_found() -> None:
    text = 'words\n\n    make x\n\n=== "tab"\n\n    ```python title="a"\n    x = 1\n\n    y\n    ```\n\n'
    text += "```sh\nls\n```\n"
    assert read_blocks(text) == [
        Block("indented", "", "make x\n", 3),
        Block("python", 'title="a"', "x = 1\n\ny\n", 8),
        Block("sh", "", "ls\n", 14),
    ]
    assert "class LateZipAR" in read_blocks('```python\n--8<-- "docs/examples/accelerator.py"\n```')[0].text


# -- stand-ins for what would be downloaded ------------------------------------------------------------


@cache
def class_names() -> tuple[str, ...]:
    """The names that published models know their classes by."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


@cache
def stand_in(family: str, condition: str) -> TokenPipeline:
    """A tiny pipeline of a family that is told what the published models are told: classes of ImageNet, or prompts."""
    classes = {"num_classes": len(class_names())}
    words = WordTokenizer.from_words(tiny.WORDS, max_length=8) if condition == "prompts" else None
    text = (None if words is None else tiny.text_encoder(words), words)
    names = class_names() if words is None else None
    pipe: TokenPipeline
    if family == "llamagen":
        kind = "c2i" if words is None else "t2i"
        network = tiny.transformer(kind, **classes)
        pipe = LlamaGenPipeline(network, tiny.vq_model(), *text, class_names=names)
    elif family == "var":
        sizes = {**classes, "scales": SCALES_256}
        networks = [tiny.var_transformer("class", seed, depth=d, **sizes) for seed, d in ((0, 3), (1, 2))]
        pipe = VARPipeline(
            networks[0], tiny.multiscale_vq(scales=SCALES_256), refiner=networks[1], class_names=names
        )
    elif family == "infinity":
        pipe = tiny.new_infinity_pipeline(scales=None, height=32, width=32)
    else:
        network = tiny.mar_transformer("class", grid_size=8, **classes)
        pipe = MARPipeline(
            network,
            tiny.kl_vae(),
            draft_transformer=tiny.mar_drafter(network),
            class_names=names,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def glm_image() -> GlmImagePipeline:
    pipe = GlmImagePipeline(
        tiny_glm_image.glm_image(layers=1),
        tiny_glm_image.processor(preview=8),
        **tiny_glm_image.decoder(),
        height=64,
        width=64,
        num_inference_steps=2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def janus() -> JanusPipeline:
    pipe = JanusPipeline(tiny_transformers.janus(), tiny_transformers.janus_processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


HUB_MODELS: dict[str, Callable[[], TokenPipeline]] = {
    "zai-org/GLM-Image": glm_image,
    "deepseek-community/Janus-Pro-7B": janus,
}
"""Repositories whose models are not in the catalogue."""


def fresh(pipe: TokenPipeline) -> TokenPipeline:
    """The same parts in a pipeline of its own, so that what a document does to it does not last.

    Masked models decide in fewer and shorter passes unless a call says how many.
    """
    names = {"class_names", "guidance_scale", "top_k", "top_p", "temperature", "guidance_schedule"}
    names |= {"height", "width", "scales"}
    settings = {name: pipe.config[name] for name in names & pipe.config.keys()}
    if isinstance(pipe, MARPipeline):
        settings |= {"num_iterations": 16, "head_steps": 8}
    copy = type(pipe)(**pipe.components, **settings)
    copy.set_progress_bar_config(disable=True)
    return copy


_LOADED: dict[tuple[str, str], TokenPipeline] = {}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, and stand-ins for everything that is neither there nor shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = AutoPipeline.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> Any:
        text = str(name)
        if text in PUBLISHED:
            model = PUBLISHED[text]
            kind = "prompts" if model.text_encoder else "classes"
            return fresh(stand_in(model.family, kind))
        if text in HUB_MODELS:
            return HUB_MODELS[text]()
        if text.count("/") == 1 and not Path(text).is_dir():
            return fresh(stand_in("var", "classes"))  # a hub id
        if text not in shipped_models():
            return real(name, **options)  # a folder that the document wrote
        # parts are shared by the documents of a process: nothing that a document shows changes weights
        key = (text, repr(sorted(options.items())))
        if key not in _LOADED:
            _LOADED[key] = real(name, **options)
        return fresh(_LOADED[key])

    monkeypatch.setattr(AutoPipeline, "from_pretrained", staticmethod(from_pretrained))
    for part, made in (
        (transformers.JanusForConditionalGeneration, tiny_transformers.janus),
        (transformers.AutoProcessor, tiny_transformers.janus_processor),
    ):
        monkeypatch.setattr(part, "from_pretrained", lambda name, made=made: made())
    monkeypatch.setattr(published, "load_named", from_pretrained)  # networks that accelerators name

    def single_file(family: str) -> Any:
        def from_single_file(path: Any, **options: Any) -> TokenPipeline:
            known = {"vq_model", "vae", "refiner", "draft_transformer", "text_encoder", "tokenizer"}
            known |= {"grid_size", "num_heads", "depth", "size"} | set(
                vars(stand_in(family, "classes"))["_internal_dict"]
            )
            assert options.keys() <= known, f"from_single_file has no {sorted(options.keys() - known)}"
            assert ("vae" if family == "mar" else "vq_model") in options
            kind = "prompts" if "text_encoder" in options else "classes"
            return fresh(stand_in(family, kind))

        return staticmethod(from_single_file)

    for cls in (LlamaGenPipeline, VARPipeline, InfinityPipeline, MARPipeline):
        monkeypatch.setattr(cls, "from_single_file", single_file(cls.family))
    networks: dict[type, Any] = {
        VARTransformer: stand_in("var", "classes").transformer,
        MARTransformer: stand_in("mar", "classes").transformer,
        VQModel: tiny.vq_model(),
    }
    for kind, network in networks.items():
        monkeypatch.setattr(kind, "from_original", staticmethod(lambda *_, network=network, **__: network))
    monkeypatch.setattr(
        EagleHead, "from_original", staticmethod(lambda path, target: tiny.eagle_head(target))
    )
    monkeypatch.setattr("varaccel.tokenizers.kl.load_kl", lambda *_, **__: tiny.kl_vae())
    nothing = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    monkeypatch.setattr("transformers.T5EncoderModel", nothing)
    monkeypatch.setattr("transformers.AutoTokenizer", nothing)
    Image.effect_noise((128, 128), 40).convert("RGB").save("image.png")
    registered, threads, state = dict(ACCELERATORS), torch.get_num_threads(), torch.get_rng_state()
    yield tmp_path
    ACCELERATORS.clear()
    ACCELERATORS.update(registered)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


# -- Python --------------------------------------------------------------------------------------------

WITH_PYTHON = [
    name
    for name in DOCUMENTS
    if any(block.language == "python" for block in read_blocks((ROOT / name).read_text()))
]


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs(document: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [b for b in read_blocks((ROOT / document).read_text()) if b.language == "python"]
    assert sum(block.is_fragment for block in blocks) <= MOST_FRAGMENTS
    module = ModuleType("document")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look themselves up
    for block in blocks:
        # counted as the document counts its lines, so that a traceback leads there
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / document), "exec")
        if not block.is_fragment:
            exec(code, module.__dict__)


def test_a_wrong_block_is_noticed(world: Path) -> None:
    """Stand-ins are strict about what the real loaders would refuse."""
    pipe = AutoPipeline.from_pretrained("llamagen-c2i-b-256")
    assert pipe("goldfish", seed=0).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="unknown class 'goldfisch'"):
        pipe("goldfisch")
    with pytest.raises(ValueError, match="unknown model"):
        AutoPipeline.from_pretrained("llamagen-c2i-m-256")
    with pytest.raises(AssertionError, match="top_kk"):
        VARPipeline.from_single_file("x.pth", vq_model="y.pth", top_kk=1)


LOOPS = ("varaccel/engine/loop.py", "varaccel/speculation/loop.py")


def test_the_loops_of_the_architecture_are_those_of_the_code() -> None:
    """Excerpts are consecutive lines of the two loops, apart from their indentation."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    excerpts = [block for block in read_blocks(text) if block.is_fragment]
    for block, file in zip(excerpts, LOOPS, strict=True):
        assert file in text
        code = "\n".join(line.removeprefix("    ") for line in (ROOT / file).read_text().splitlines())
        assert block.text in code, f"docs/architecture.md, line {block.line}, differs from {file}"


def test_files_that_the_architecture_names_exist() -> None:
    """Named from the package or from the root of the repository; rooms as folders of the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:[\w*]+/)+(?:[\w*]+\.py)?)`", text))
    assert len(names) > 40
    places = ("", "varaccel/", "varaccel/*/")
    assert [name for name in sorted(names) if not any(any(ROOT.glob(place + name)) for place in places)] == []
    table = text.split("## The rooms")[1].split("## The nouns")[0]
    rooms = re.findall(r"^\| (`\w+/?`(?:, `\w+/`)?) \|", table, re.MULTILINE)
    layers = [name for row in rooms for name in re.findall(r"\w+", row)]
    assert layers == ["__main__", *DOORS, *reversed(LAYERS)]


# -- command lines -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command line of a document, without what it is prefixed with."""

    words: tuple[str, ...]
    line: int


_SHELLS = {"sh", "bash", "shell", "console", "text", "", "indented"}
_PROGRAMS = {"varaccel", "python", "torchrun", "accelerate", "make"}


def read_commands(text: str) -> list[Command]:
    """Command lines of the blocks that are no code, in order; other lines of these blocks are no commands."""
    commands = []
    for block in read_blocks(text):
        if block.language not in _SHELLS:
            continue
        joined = re.sub(r"\\\n\s*", " ", block.text)
        for line in joined.splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # OMP_NUM_THREADS=1 ...
                words = words[1:]
            program = words[0].rsplit("/")[-1] if words else ""
            if program in _PROGRAMS:
                commands.append(Command((program, *words[1:]), block.line))
    return commands


def test_commands_are_found() -> None:
    text = "    OMP_NUM_THREADS=1 varaccel bench -a x \\\n        --batch 8   # why\n    ls\n\n```sh\nmake docs\n```\n"
    assert [c.words for c in read_commands(text)] == [
        ("varaccel", "bench", "-a", "x", "--batch", "8"),
        ("make", "docs"),
    ]


def without_dots(words: tuple[str, ...]) -> list[str]:
    """Without "and so on", as a word of its own or as the value of an option."""
    kept: list[str] = []
    for word in words:
        if word != "...":
            kept.append(word)
        elif kept and kept[-1].startswith("-"):
            kept.pop()
    return kept


def check_varaccel(words: tuple[str, ...]) -> None:
    """Raises what the command line would say, and runs nothing; accelerators and options must exist."""
    from varaccel.__main__ import command_line
    from varaccel.accelerators.notation import parse_grid

    command: Any = typer.main.get_command(command_line)
    arguments = without_dots(words)
    if arguments[:1] in ([], ["--help"]):
        return
    context = typer.Context(command, info_name="varaccel")
    while True:
        name, command, arguments = command.resolve_command(context, list(arguments))
        if not hasattr(command, "commands"):
            break
        context = typer.Context(command, info_name=name, parent=context)
    if "--help" in arguments:
        return
    with command.make_context(name, arguments, parent=context) as made:
        chosen = made.params.get("accelerator")
        if isinstance(chosen, str):
            assert chosen in ACCELERATORS, chosen
        elif chosen:
            parse_grid(chosen)


class Parsed(Exception):
    """Raised where a script has read its command line."""


def check_script(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The script exists and its parser takes these arguments; nothing behind the parser is run."""
    path, *arguments = words
    assert (ROOT / path).is_file(), f"there is no {path}"
    text = (ROOT / path).read_text()
    if "parser" not in text and "argparse" not in text:
        assert not arguments, f"{path} takes no arguments"
        return
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str((ROOT / path).parent))
        check_parser(load_script(path), path, without_dots(tuple(arguments)), monkeypatch)


def check_parser(
    module: ModuleType, name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main()` of a module reads these arguments without complaint; it is stopped there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        raise Parsed(parse(self, *given, **options))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            module.main()


def check_make(words: tuple[str, ...]) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets, f"no target of the Makefile: {sorted(set(words) - targets)}"


COMMANDS = [name for name in [*DOCUMENTS, *CARDS] if read_commands((ROOT / name).read_text())]


@pytest.mark.parametrize("document", COMMANDS)
def test_command_lines_parse(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in read_commands((ROOT / document).read_text()):
        program, *words = command.words
        try:
            if program == "varaccel":
                check_varaccel(tuple(words))
            elif program == "make":
                check_make(tuple(words))
            else:
                # torchrun --nproc-per-node 8 X.py ..., accelerate launch ... X.py ...
                script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
                if program == "python" and words[:1] == ["-m"]:
                    check_parser(import_module(words[1]), words[1], words[2:], monkeypatch)
                elif program == "python" and words[:1] == ["-c"]:
                    compile(words[1], document, "exec")
                elif program == "torchrun" and "varaccel" in words:  # torchrun ... -m varaccel generate ...
                    check_varaccel(tuple(words[words.index("varaccel") + 1 :]))
                else:
                    assert script is not None, "no script"
                    check_script(tuple(words[script:]), monkeypatch)
        except REFUSED as error:
            pytest.fail(f"{document}, block at line {command.line}: {' '.join(command.words)}\n{error}")


@pytest.mark.parametrize(
    "line",
    [
        "varaccel generate --sead 1 x",
        "varaccel generat x",
        "varaccel bench -a jacoby",
        "varaccel bench -a jacobi:windo=3",
        "make rockets",
        "python pipelines/var_plain.py --fast",
        "python pipelines/train_mini_var.py --ouut runs",
        "python pipelines/nothing.py",
    ],
)
def test_wrong_command_lines_are_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(line)
    checks = {"varaccel": check_varaccel, "make": check_make}
    with pytest.raises(REFUSED):  # noqa: PT012
        if program == "python":
            check_script(tuple(words), monkeypatch)
        else:
            checks[program](tuple(words))


def test_the_table_of_published_models_is_the_catalogue() -> None:
    """docs/models/index.md names every model that can be asked for, with its files."""
    text = (ROOT / "docs" / "models" / "index.md").read_text()
    for name in shipped_models():
        assert f"| `{name}` |" in text
    for name, model in PUBLISHED.items():
        row = f"| `{name}` | `{model.repository}` | `{model.weights}` | `{model.tokenizer}` | "
        assert row + ("prompts |" if model.text_encoder else "ImageNet classes |") in text
    listed = set(re.findall(r"^\| `([\w.-]+)` \| `\w+/", text, re.MULTILINE))
    assert listed == set(PUBLISHED)


def test_pages_of_families_tell_the_defaults_of_the_catalogue() -> None:
    """Guidance and filters in the tables of docs/models are those that the models come with."""
    for name, model in PUBLISHED.items():
        page = (ROOT / "docs" / "models" / f"{model.family}.md").read_text()
        guidance = page.split("## Guidance and sampling")[1]
        for setting in ("guidance_scale", "top_k", "top_p", "head_steps"):
            if setting in model.settings:
                assert re.search(rf"\| {re.escape(str(model.settings[setting]))} \|", guidance), (
                    name,
                    setting,
                )
    assert np.isclose(AutoPipeline.from_pretrained("mini-llamagen").config.guidance_scale, 2.5)
