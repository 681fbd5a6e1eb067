"""Kinds of devices are told apart in one place."""

from __future__ import annotations

import re

import pytest
import torch

from tests.scripts import ROOT
from varaccel.errors import InputError
from varaccel.nn import devices
from varaccel.pipelines.placement import check_place

_KIND = r"[\"'](cuda|cpu|mps|xpu)[\"']"
DECISION = re.compile(rf"device(\.type)? *(==|!=) *[\"']|{_KIND} *(if|else|==|!=)|(==|!=|else) *{_KIND}")


def test_devices_are_told_apart_in_one_place() -> None:
    found = []
    for folder in ("varaccel", "eval", "app", "pipelines", "tokenizers"):
        for file in (ROOT / folder).rglob("*.py"):
            if file == ROOT / "varaccel" / "nn" / "devices.py":
                continue
            lines = file.read_text(encoding="utf-8").splitlines()
            found += [
                f"{file}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if DECISION.search(line)
            ]
    assert not found


def test_number_types_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.real_type("cpu") == devices.real_type(torch.device("cuda", 1)) == torch.float64
    assert devices.real_type("mps") == torch.float32
    for has, expected in ((True, torch.float64), (False, torch.float32)):
        facts = type("Facts", (), {"has_fp64": has})
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda place, facts=facts: facts)
        assert devices.real_type("xpu") == expected


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu:x", "unknown device"),
        ("gpu", "unknown device"),
        ("", "unknown device"),
        ("cuda:99", "no GPU 99"),
        ("mps", "no mps"),
    ],
)
def test_places_that_are_not_there(device: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_place(device, "float32")


def test_the_host_is_there() -> None:
    check_place("cpu", "float32")
    assert devices.is_available("cpu")
    assert devices.is_host(torch.device("cpu"))
    assert not devices.is_gpu("cpu")
    devices.wait_for("cpu")
