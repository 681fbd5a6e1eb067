"""The recipes in pipelines/: each runs as a user runs it, in an empty folder, and does what it says.

What a training recipe asks of other programs (render scenes, train an image tokenizer or a text encoder, encode) is
checked against their command lines. Scenes, token ids and latents are then really made; the tokenizers and the text
encoder are those that ship, since training them takes minutes even at their smallest and has tests of its own
(test_vq_training, test_kl_training, test_text_training). Transformers, refiner and assembling are the recipe's own
code and run, on a few images and with small networks.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.docs.test_doc_code import check_parser
from tests.scripts import ROOT, load_script
from tests.tiny import eagle_head, new_pipeline
from varaccel import AutoPipeline, LlamaGenPipeline
from varaccel.errors import InputError
from varaccel.shipped import weights_folder
from varaccel.training import allocator, stages

pytestmark = pytest.mark.slow

RECIPES = ROOT / "pipelines"

# name: the images that it writes, and how many lines of statistics it prints
DRAWING: dict[str, tuple[tuple[str, ...], int]] = {
    "llamagen_combined": (("0", "1"), 3),
    "llamagen_jacobi": (("0", "1", "0-passes", "1-passes"), 2),
    "llamagen_lantern": (("delta", "multiplier"), 3),
    "llamagen_plain": (("0", "1"), 1),
    "llamagen_speculative": (("plain", "dynamic"), 5),
    "llamagen_zipar": (("0", "1"), 2),
    "mar_cspd": (("", "plain"), 4),
    "mar_fast": (("", "plain", "sheet"), 3),
    "mar_plain": (("0", "1", "passes"), 1),
    "var_code": (("", "plain"), 2),
    "var_inpaint": (("before", "after", "sheet"), 1),
    "var_scale_plan": (("plain", "unguided", "fast-var", "skip-var", "several"), 5),
    "var_plain": (("0", "1"), 1),
}
TRAINING = ("train_mini_llamagen", "train_mini_mar", "train_mini_var", "train_small_janus", "train_all")
TOOLS = ("add_drafters", "weights_manifest")

STATISTICS = re.compile(r"^(\w+)\(.*\): \d+ images of \d+ tokens in \d+ passes", re.MULTILINE)


def test_every_recipe_has_a_case() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == {*DRAWING, *TRAINING, *TOOLS}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


# -- recipes that draw ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWING)
def test_a_recipe_draws_what_it_says(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    parts, lines = DRAWING[name]
    stem = name.replace("_", "-")
    assert {path.name for path in here.rglob("*") if path.is_file()} == {
        f"{stem}-{part}.png" if part else f"{stem}.png" for part in parts
    }
    drawn = [Image.open(path) for path in sorted((here / "outputs").iterdir())]
    assert all(np.asarray(image.convert("L")).std() > 5 for image in drawn), "an image is not flat"
    if name.startswith("llamagen") or name == "var_plain":
        different = [image.tobytes() for image in drawn]
        assert len(set(different)) == len(different) - (name == "llamagen_speculative")
    out = capsys.readouterr().out
    told = STATISTICS.findall(out)
    assert len(told) == lines
    if name == "llamagen_speculative":
        assert "equal pixels: 1.0" in out
    if name == "llamagen_zipar":
        assert "1.9 times fewer passes" in out
    if name == "var_code":
        assert (
            len(re.findall(r"^(draft|refine) \d+ tokens .* a cache of [\d.]+ MiB$", out, re.MULTILINE)) == 2
        )


# -- recipes that train --------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stages with a command line of their own: checked, and fulfilled in this process (see the top)."""
    seen: list[tuple[str, ...]] = []
    weights = weights_folder()

    def value(words: tuple[str, ...], option: str) -> Path:
        return Path(words[words.index(option) + 1])

    def run(*command: object) -> None:
        words = tuple(map(str, command))
        seen.append(words)
        if words[0] == "-m":
            module: Any = import_module(words[1])
            check_parser(module, words[1], list(words[2:]), monkeypatch)
            if words[1] != "varaccel.training.text":
                assert module.main(words[2:]) == 0
                return
            stages.adopt_text(weights / "mini-llamagen", value(words, "--out"))
            return
        script = Path(words[0]).relative_to(ROOT)
        check_parser(load_script(str(script)), str(script), list(words[1:]), monkeypatch)
        made = {
            "mini-vq": "mini-llamagen/vq_model",
            "mini-msvq": "mini-var/vq_model",
            "mini-kl": "mini-mar/vae",
        }
        folder = value(words, "--out")
        shutil.copytree(weights / made[folder.name], folder / "export")

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)  # which starts the program anew
    return seen


def config(name: str, here: Path, **sizes: int) -> Path:
    """The recipe's config with smaller networks and batches."""
    content = json.loads((RECIPES / name).read_text())
    content["model"].update(sizes)
    content["recipe"]["batch_size"] = 4
    path = here / name
    path.write_text(json.dumps(content))
    return path


def recipe(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> int:
    """Run a recipe with these options; its exit status."""
    monkeypatch.setattr(sys, "argv", [f"pipelines/{name}.py", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return int(ended.value.code or 0)


SMALL = (
    "--images",
    16,
    "--workers",
    1,
    "--minutes",
    0.01,
    "--no-compile",
    "--tokenizer-minutes",
    1,
    "--validation",
    8,
)


def draws(folder: Path, **call: Any) -> Any:
    """The pipeline in a folder, after it has drawn an image."""
    pipe = AutoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red sphere", seed=0, **call).images[0].size == (128, 128)
    return pipe


def test_training_mini_llamagen(
    here: Path, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config("mini_llamagen.json", here, dim=48, num_layers=1, num_heads=4)
    assert recipe(monkeypatch, "train_mini_llamagen", "--config", small, "--text-steps", 1, *SMALL) == 0
    programs = [Path(words[words[0] == "-m"]).name for words in commands]
    assert programs == [
        "varaccel.scenes.cache",
        "varaccel.training.text",
        "train_vq_scenes.py",
        "varaccel.training.token_ids",
    ]
    pipe = draws(here / "runs" / "mini-llamagen", accelerator="zipar")
    assert pipe.transformer.config.dim == 48
    assert (pipe.config.guidance_scale, pipe.config.temperature) == (2.5, 0.5)


def test_training_mini_var_and_a_refiner(
    here: Path, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config("mini_var.json", here, dim=32, depth=2, num_heads=2)
    smaller = config("mini_var_small.json", here, dim=16, depth=1, num_heads=1)
    assert recipe(monkeypatch, "train_mini_var", "--config", small, *SMALL) == 0
    refine = ("--config", smaller, "--stages", "refiner", *SMALL)
    assert recipe(monkeypatch, "train_mini_var", *refine) == 2, "a refiner needs a teacher"
    teacher = ("--teacher", "runs/var/export", "--draft-scales", 4)
    assert recipe(monkeypatch, "train_mini_var", *refine, *teacher) == 0
    export = Path("runs/var-small-refiner/export")
    again = ("--config", small, "--stages", "pipeline", "--refiner", export, *SMALL)
    assert recipe(monkeypatch, "train_mini_var", *again) == 0
    assert len(commands) == 3
    pipe = draws(here / "runs" / "mini-var", accelerator="code")
    assert pipe.refiner.config.dim == 16


def test_training_mini_mar_and_a_drafter(
    here: Path, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "head_depth": 1}
    small = config("mini_mar.json", here, dim=32, head_width=32, **sizes)
    smaller = config("mini_mar_small.json", here, dim=16, head_width=16, **sizes)
    assert recipe(monkeypatch, "train_mini_mar", "--config", small, *SMALL) == 0
    drafter = ("--config", smaller, "--stages", "transformer", *SMALL)
    assert recipe(monkeypatch, "train_mini_mar", *drafter) == 0
    again = ("--config", small, "--stages", "pipeline", "--draft", "runs/mar-small/export")
    assert recipe(monkeypatch, "train_mini_mar", *again) == 0
    assert len(commands) == 3
    pipe = draws(here / "runs" / "mini-mar", accelerator="cspd", num_iterations=4, head_steps=4)
    assert pipe.draft_transformer.config.dim == 16


# -- tools ---------------------------------------------------------------------------------------------


def test_training_a_small_janus_and_measuring_it(
    here: Path, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((RECIPES / "small_janus.json").read_text())
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    content["text"].update(hidden_size=24, intermediate_size=24, **heads)
    content["recipe"]["batch_size"] = 4
    small = here / "small.json"
    small.write_text(json.dumps(content))
    assert recipe(monkeypatch, "train_small_janus", "--config", small, *SMALL) == 0
    folder, figures = here / "runs" / "small-janus", here / "janus.json"
    janus_loop = load_script("eval/janus_loop.py")
    wanted = ["-a", "plain", "-a", "jacobi:window=8", "--batch", "2", "--repeats", "1"]
    shown = [
        "--images",
        str(here / "janus.png"),
        "--vq-model",
        str(ROOT / "weights" / "mini-llamagen" / "vq_model"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["janus_loop.py", "--model", str(folder), *wanted, *shown, "--out", str(figures)]
    )
    assert janus_loop.main() == 0
    methods = json.loads(figures.read_text())["methods"]
    assert methods["generate()"]["passes"] == methods["published loop"]["passes"] == [256]
    assert methods["published loop"]["equal_greedy"] == 1
    assert methods["plain"]["equal_greedy"] == methods["jacobi:window=8"]["equal_greedy"] == 1
    assert methods["jacobi:window=8"]["passes"][0] < 256
    assert (here / "janus.png").is_file()


def test_drafters_are_added(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "model"
    pipe = AutoPipeline.from_pretrained("mini-llamagen")
    parts = {**pipe.components, "eagle_head": None, "draft_transformer": None}
    LlamaGenPipeline(**parts, guidance_scale=3.5, temperature=0.25).save_pretrained(folder)
    eagle_head(pipe.transformer).save_pretrained(here / "eagle")
    pipe.draft_transformer.save_pretrained(here / "small")
    assert recipe(monkeypatch, "add_drafters", folder) == 2
    assert (
        recipe(monkeypatch, "add_drafters", folder, "--eagle", here / "eagle", "--small", here / "small") == 0
    )
    after = AutoPipeline.from_pretrained(folder)
    assert after.drafters.keys() == {"eagle", "small"}
    assert (after.config.guidance_scale, after.config.temperature) == (3.5, 0.25)
    for name, tensor in pipe.draft_transformer.state_dict().items():
        assert torch.equal(after.draft_transformer.state_dict()[name], tensor)


def test_adding_no_drafter_is_an_error() -> None:
    with pytest.raises(InputError, match="name a drafter"):
        load_script("pipelines/add_drafters.py").add_drafters(Path("model"), None, None)


def test_the_manifest_of_a_copy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the shipped weights it writes what ships; on a changed copy another digest."""
    shutil.copytree(weights_folder(), here / "weights")
    (here / "pipelines").mkdir()
    script = here / "pipelines" / "weights_manifest.py"
    shutil.copy(RECIPES / "weights_manifest.py", script)
    manifest = here / "weights" / "manifest.json"
    before = json.loads(manifest.read_text())
    manifest.unlink()
    run: Callable[[], object] = lambda: runpy.run_path(str(script), run_name="__main__")  # noqa: E731
    run()
    assert json.loads(manifest.read_text()) == before
    assert "MB in all" in capsys.readouterr().out
    (here / "weights" / "mini-var" / "model_index.json").write_text("{}")
    run()
    after = json.loads(manifest.read_text())
    changed = {name for name in before["models"] if before["models"][name] != after["models"][name]}
    assert changed == {"mini-var"}
    assert after["measures"] == before["measures"]


LOOPS = {
    "llamagen_loop": ("c2i", ("--tokens", "5", "--top-k", "0")),
    "var_loop": ("var-class", ("--top-p", "0")),
    "mar_loop": ("mar-class", ("--iterations", "3", "--head-steps", "2")),
}


@pytest.mark.parametrize("name", LOOPS)
def test_our_loops_against_published_ones(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, wanted = LOOPS[name]
    new_pipeline(model).save_pretrained(here / "model")
    arguments = ["--model", str(here / "model"), "--batch", "2", "--out", str(here / "figures.json"), *wanted]

    def run(repeats: str) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--repeats", repeats])
        return load_script(f"eval/{name}.py").main()

    assert run("0") == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err
    assert not (here / "figures.json").exists()
    assert run("2") == 0
    figures = json.loads((here / "figures.json").read_text())
    assert figures == json.loads(capsys.readouterr().out)
    if name == "mar_loop":
        assert figures["rows"]["published loop"]["ratio"] == 1
        assert figures["rows"]["ours"]["ratio"] > 0
    else:
        assert figures["ratio"] > 0
        assert {loop: len(seconds) for loop, seconds in figures["seconds"].items()} == {
            "ours": 2,
            "published loop": 2,
        }
