"""All models in one unattended call: within its minutes, without a connection and without optional libraries.

The networks are tiny, so what they draw says nothing; what is tested is that every part is trained, fits the others and
is ready to install when the time is up. On a busy machine the last of them may not be reached.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.test_doc_code import check_parser, check_script, check_varaccel
from tests.scripts import ROOT, load_script
from varaccel import AutoPipeline
from varaccel.errors import InputError
from varaccel.shipped import weights_folder
from varaccel.training.timetable import UNTIL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MINUTES = 3.0
NOT_THERE = (
    "gradio",
    "torch_fidelity",
    "ftfy",
    "bs4",
    "sentencepiece",
    "peft",
    "cv2",
    "onnxruntime",
    "playwright",
)

BARE_MACHINE = f"""
import importlib.machinery, importlib.metadata, socket

find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split(".")[0] in {NOT_THERE!r} else find(name, *rest)
)
from_name = importlib.metadata.Distribution.from_name

def installed(name):  # some ask for the distribution before they import
    if name.replace("-", "_").lower() in {NOT_THERE!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)

importlib.metadata.Distribution.from_name = installed
connect = socket.socket.connect

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"no connection to {{address}}")
    return connect(self, address)

socket.socket.connect = refuse
"""


def train_all(here: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run the recipe on a machine that has little."""
    (here / "bare").mkdir(exist_ok=True)
    (here / "bare" / "sitecustomize.py").write_text(BARE_MACHINE)
    paths = os.pathsep.join([str(here / "bare"), str(ROOT)])
    words = [sys.executable, ROOT / "pipelines" / "train_all.py", "--out", here / "all", *options]
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(word) for word in words], env=environment, cwd=here, capture_output=True, text=True, check=False
    )


def test_one_call_trains_judges_and_installs_everything(tmp_path: Path) -> None:
    recipe = Path(__file__).parent / "train_all_tiny.json"
    begun = time.monotonic()
    ended = train_all(
        tmp_path, "--budget-minutes", MINUTES, "--device", "cpu", "--recipe", recipe, "--workers", 2
    )
    # a call counts from its first line: before that, a busy machine takes its time to start Python
    assert time.monotonic() - begun < 60 * MINUTES + 30, ended.stdout
    spent = re.search(r"^([\d.]+) of 3 minutes$", ended.stdout, re.MULTILINE)
    assert spent is not None, ended.stdout + ended.stderr
    assert float(spent[1]) <= MINUTES
    assert "failed" not in ended.stdout, ended.stdout + ended.stderr
    assert ended.returncode == int("not finished" in ended.stdout), ended.stderr
    assert "mini-llamagen-adherence: done" in ended.stdout, ended.stdout

    ready = tmp_path / "all" / "ready"
    folder = ready / "mini-llamagen"
    pipe = AutoPipeline.from_pretrained(folder)
    assert pipe.drafters.keys() == {"eagle", "small"}
    assert pipe.transformer.config.prefix_identity
    assert pipe("a red cube", seed=0, accelerator="speculative").images[0].size == (128, 128)
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["runs"].keys() == {"mini-vq", "llamagen", "llamagen-small", "eagle"}
    assert numbers["runs"]["llamagen-small"]["samples"] == 4 * numbers["runs"]["llamagen-small"]["steps"]
    assert numbers["adherence"]["images"] == 4
    assert numbers["adherence"]["correct"].keys() == {"successes", "total", "share", "low", "high"}
    assert "Prompt adherence, 4 held-out prompts" in (folder / "numbers.md").read_text(encoding="utf-8")
    assert (folder / "samples.png").is_file()

    weights = tmp_path / "weights"
    for model in ready.iterdir():
        shutil.copytree(weights_folder() / model.name, weights / model.name)
    assert load_script("pipelines/train_all.py").install(ready, weights) == sorted(
        p.name for p in ready.iterdir()
    )
    assert (weights / "mini-llamagen" / "README.md").is_file(), "the card stays"
    for model in ready.iterdir():
        assert not (weights / model.name / "text_encoder").exists() or model.name == "mini-llamagen"
        AutoPipeline.from_pretrained(weights / model.name)


def test_a_second_call_has_only_what_is_left_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The minutes of a folder are spent once: what was killed goes on, and what is done is passed over."""
    (tmp_path / "timetable.json").write_text(json.dumps({"minutes": 3.0, "spent": 179.0}))
    script = load_script("pipelines/train_all.py")

    def status(*options: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train_all.py", "--out", str(tmp_path), *map(str, options)])
        return int(script.main())

    tiny = Path(__file__).parent / "train_all_tiny.json"
    assert status("--budget-minutes", 3, "--recipe", tiny) == 1
    assert "scenes: not finished" in capsys.readouterr().out
    assert status("--budget-minutes", 4, "--recipe", tiny) == 2
    assert "holds a call of 3 minutes" in capsys.readouterr().err
    assert status("--install", tmp_path / "weights") == 2
    assert "there is no finished pipeline" in capsys.readouterr().err


def test_other_text_or_images_are_not_borrowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready, weights = tmp_path / "ready", tmp_path / "weights"
    small = AutoPipeline.from_pretrained("mini-var-small")
    small.save_pretrained(ready / "mini-var-small")
    shutil.copytree(weights_folder() / "mini-var-small", weights / "mini-var-small")
    script = load_script("pipelines/train_all.py")
    assert script.install(ready, weights) == ["mini-var-small"]
    assert "nothing is borrowed" in capsys.readouterr().out, "no siblings here"
    assert not (weights / "mini-var-small" / "borrowed.json").exists()
    AutoPipeline.from_pretrained(weights / "mini-var-small")
    with pytest.raises(InputError, match="no finished pipeline"):
        script.install(tmp_path / "empty", weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kept", [False, True])
def test_the_recipes_that_come_along(
    device: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command is one that its program understands, and what is trained together fits."""
    script = load_script("pipelines/train_all.py")
    recipe = json.loads((ROOT / "pipelines" / f"train_all_{device}.json").read_text(encoding="utf-8"))
    options = argparse.Namespace(
        device=device, only=list(script.FAMILIES), keep_tokenizers=kept, out=tmp_path, workers=2
    )
    plan = script.Plan(recipe, options)
    lanes = plan.lanes()
    assert lanes.keys() == {"scenes", *(script.FAMILIES if device == "cuda" else ["models"])}
    jobs = {job.name: job for lane in lanes.values() for job in lane}
    trained = set(recipe["shares"]) - ({"vq", "msvq", "kl"} if kept else set())
    assert {name for name, job in jobs.items() if job.share} == trained
    assert all(job.seconds for name, job in jobs.items() if name != "scenes")
    for job in jobs.values():
        for words in job.commands:
            program, *rest = [word.replace(UNTIL, "1") for word in words]
            if words[:2] == ("-m", "varaccel"):
                check_varaccel(tuple(rest[1:]))
            elif program == "-m":
                check_parser(import_module(rest[0]), rest[0], rest[1:], monkeypatch)
            else:
                check_script((str(Path(program).relative_to(ROOT)), *rest), monkeypatch)
    configs = {
        name: json.loads(plan.config(name).read_text(encoding="utf-8"))["model"] for name in script.CONFIGS
    }
    sizes = {configs[name]["vocab_size"] for name in ("llamagen", "llamagen-small")}
    assert sizes == {1024 if kept else configs["vq"]["codebook_size"]}
    assert (
        configs["var"]["vocab_size"] == configs["var-small"]["vocab_size"] == configs["msvq"]["codebook_size"]
    )
    reserved = {name: sum(job.seconds for job in lane) for name, lane in lanes.items()}
    budget = 480 if device == "cuda" else 480 * 60
    assert max(reserved.values()) + recipe["closing_seconds"] < budget / 2, "most of the time is for training"
