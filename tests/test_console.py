"""Reports on consoles that cannot show every sign."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT
from varaccel.console import tolerant_console

SHOWN = "24.2 ± 1.0, 2.5× plain, 5 … 6, √2 → 猫, é, “a”"


def printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    tolerant_console()
    print(SHOWN, flush=True)
    return raw.getvalue().decode(encoding).strip()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "koi8-r", "utf-8"])
def test_nothing_is_lost_that_can_be_said(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(encoding, monkeypatch)
    assert text.startswith("24.2 ")
    assert text.endswith(SHOWN if encoding == "utf-8" else ('"a"', "“a”"))
    if encoding == "ascii":
        assert text == '24.2 +/- 1.0, 2.5x plain, 5 ... 6, sqrt2 -> ?, e, "a"'


def test_what_has_no_encoding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    tolerant_console()
    print(SHOWN)


@pytest.mark.slow  # starts interpreters
@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        (["-m", "varaccel", "models"], "ascii"),
        (["-m", "varaccel", "bench", "--help"], "cp1252"),
        (["-m", "varaccel", "generate", "a 猫 ± cube", "--model", "m×n"], "ascii"),
        (["eval/fid.py", "--help"], "ascii"),
        (["eval/fid.py", "no×where", "--reference", "scenes:20"], "cp1252"),
        (["eval/sample.py", "--model", "m×n", "--out", "runs/none"], "cp1252"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_programs_print_on_any_console(command: list[str], encoding: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, timeout=240
    )
    text = (ended.stdout + ended.stderr).decode(
        encoding, "replace"
    )  # click writes UTF-8 where it meets ASCII
    assert "Traceback" not in text, text
    assert "UnicodeEncodeError" not in text
    assert ended.returncode in (0, 2)
    assert text.strip()


def test_no_bar_where_there_is_no_terminal(tmp_path: Path) -> None:
    """A log of a long job is for reading: a bar would fill it with a line per step."""
    command = [sys.executable, "-m", "varaccel.scenes.cache", "--out", str(tmp_path), "--count", "2"]
    result = subprocess.run(
        [*command, "--workers", "1"], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert "%" not in result.stderr


def test_every_bar_asks_whether_there_is_a_terminal() -> None:
    """tqdm asks only if `disable` is None, so that every call must say it; None is also what `or` ends with."""
    bars = [
        (file, call)
        for folder in ("varaccel", "eval", "pipelines", "tokenizers", "app")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "tqdm"
    ]
    assert bars
    for file, call in bars:
        disable = next((ast.unparse(k.value) for k in call.keywords if k.arg == "disable"), "missing")
        assert disable.split(" or ")[-1] == "None", f"{file.relative_to(ROOT)}:{call.lineno}"
