"""Two processes that hold a model together draw what one process draws with the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import varaccel
from tests.transformers_cases import CASES, RECENT
from tests.transformers_hosts.split_process import everything
from varaccel.__main__ import command_line
from varaccel.errors import InputError

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not RECENT, reason="models are split by newer versions of transformers")
SPLIT = ("janus", "emu3", "glm-image")


def saved(name: str, folder: Path) -> Path:
    """A model as transformers saves it."""
    pipe = CASES[name].pipeline()
    pipe.model.save_pretrained(folder)
    pipe.processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    folders = [saved(name, tmp_path / name) for name in SPLIT]
    script = Path(__file__).with_name("split_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, script, tmp_path, *folders], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # without a seed too
    for name in SPLIT:
        assert first[name]["parts"] == 2
        assert first[name]["split"] == everything(CASES[name].pipeline())

    # the command line speaks and writes once
    told = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [one["out"] for one in told] == [str(tmp_path / "split.png")]
    one = ["generate", "a red sphere", "--model", str(folders[0]), "--seed", "3"]
    assert CliRunner().invoke(command_line, [*one, "--out", str(tmp_path / "whole.png")]).exit_code == 0
    assert (tmp_path / "split.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tp_size": 3},
            "the model has 4 heads, which 3 processes cannot share out evenly; choose tp_size from 1, 2",
        ),
        ({"tp_size": 4}, "2 heads of keys and values, which 4 processes cannot"),
        ({"tp_size": 0}, "tp_size"),
        (
            {"tp_size": 2},
            "tp_size=2 needs 2 processes, and this is one; start them with torchrun --nproc-per-node 2",
        ),
        ({"tp_size": 2, "distributed_config": {"tp_size": 2}}, "leave tp_size and tp_plan out"),
        ({"distributed_config": {"tp_size": 3}}, "4 heads, which 3 processes"),
    ],
    ids=["heads", "KV heads", "none", "one process", "twice", "configuration"],
)
def test_a_number_of_processes_that_cannot_be_is_one_sentence(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = saved("janus", tmp_path / "janus")
    (folder / "model.safetensors").unlink()  # nothing is loaded before
    with pytest.raises(InputError, match=message) as raised:
        varaccel.AutoPipeline.from_pretrained(folder, **options)
    assert "\n" not in str(raised.value)


def test_one_process_is_no_split(tmp_path: Path) -> None:
    pipe: Any = varaccel.AutoPipeline.from_pretrained(saved("janus", tmp_path / "janus"), tp_size=1)
    assert not hasattr(pipe.model.config, "distributed_config")


def test_a_model_of_the_library_is_not_split() -> None:
    with pytest.raises(InputError, match="tp_size is for models of transformers"):
        varaccel.AutoPipeline.from_pretrained("mini-llamagen", tp_size=2)
