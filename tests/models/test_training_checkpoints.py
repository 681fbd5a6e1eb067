"""What training code writes loads as the published files do: wrappers' names, averages, states of whole trainers."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models import test_eagle, test_mar_parity, test_var_parity
from tests.tiny import GRID, transformer
from tests.tokenizers import test_kl_parity, test_vq_model
from varaccel.errors import CheckpointError
from varaccel.models.eagle import EagleHead
from varaccel.models.llamagen import LlamaGenTransformer
from varaccel.models.mar import MARTransformer
from varaccel.models.var import VARTransformer
from varaccel.tokenizers.kl import load_kl
from varaccel.tokenizers.multiscale_vq import MultiScaleVQModel
from varaccel.tokenizers.vq import VQModel

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A kind of network with published weights, and how a file of it is loaded.

    Attributes:
        state: in the published layout.
        load: from a file.
        averaged: whether averaged weights are taken where there are both.
    """

    state: Callable[[], State]
    load: Callable[[Path], nn.Module]
    averaged: bool = False


def _vq_state() -> State:
    return dict(test_vq_model.tiny(seed=1).state_dict())


def _var() -> dict[str, Any]:
    config: dict[str, Any] = test_var_parity.TRANSFORMERS["base"]
    return config


def _multiscale() -> dict[str, Any]:
    config: dict[str, Any] = test_var_parity.TOKENIZERS["vae_a"]
    return config


FAMILIES = {
    "llamagen": Family(
        lambda: dict(transformer("c2i", seed=1).state_dict()),
        lambda path: LlamaGenTransformer.from_original(path, num_heads=4, grid_size=GRID),
    ),
    "vq": Family(_vq_state, lambda path: VQModel.from_original(path, **test_vq_model.TINY)),
    "var": Family(
        lambda: dict(test_var_parity.tensors(_var()["weights"])),
        lambda path: VARTransformer.from_original(path, num_heads=_var()["num_heads"]),
    ),
    "multiscale vq": Family(
        lambda: dict(test_var_parity.tensors(_multiscale()["weights"])),
        lambda path: MultiScaleVQModel.from_original(
            path, scales=_multiscale()["patch_nums"], norm_groups=_multiscale()["norm_groups"]
        ),
    ),
    "mar": Family(
        lambda: dict(test_mar_parity.tensors("mar_weights")),
        lambda path: MARTransformer.from_original(path, num_heads=4, decoder_heads=4),
        averaged=True,
    ),
    "kl": Family(test_kl_parity.published, load_kl),
    "eagle": Family(
        lambda: dict(test_eagle.weights(0)),
        lambda path: EagleHead.from_original(path, target=test_eagle.published_target()),
    ),
}


def named(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def wrapped_part(state: State) -> State:
    """One part of the network is compiled."""
    return {
        ".".join([name.split(".")[0], "_orig_mod", *name.split(".")[1:]]) if "." in name else name: value
        for name, value in state.items()
    }


WRITTEN: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "distributed": lambda s: named("module.", s),
    "compiled": lambda s: named("_orig_mod.", s),
    "compiled, then distributed": lambda s: named("module._orig_mod.", s),
    "distributed, then compiled": lambda s: {"state_dict": named("_orig_mod.module.", s)},
    "a part compiled": wrapped_part,
    "VAR's trainer": lambda s: {
        "epoch": 10,
        "iter": 0,
        "trainer": {"config": {"patch_nums": (1, 2)}, "var_wo_ddp": s, "var_opt": {"state": {0: {}}}},
        "args": {"bs": 768, "tlr": 1e-4},
    },
    "VAR's trainer, image tokenizer": lambda s: {"epoch": 10, "trainer": {"config": {}, "vae_local": s}},
    "DeepSpeed": lambda s: {"module": named("module.", s), "global_steps": 7, "ds_config": {}},
    "Lightning": lambda s: {"state_dict": named("model.", s), "epoch": 1, "loops": {}},
    "torch's AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **named("module.", s)},
    "ema alone": lambda s: {"ema": named("module.", s), "steps": 3},
    "model_ema alone": lambda s: {"model_ema": named("_orig_mod.", s), "epoch": 1},
    "ema_state_dict alone": lambda s: {"ema_state_dict": s, "decay": 0.999},
    "figures and paths beside it": lambda s: {
        "model": s,
        "best": np.float64(0.5),
        "args": argparse.Namespace(out=Path("runs"), data=types.SimpleNamespace(size=256)),
    },
}


def bytes_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.items()
    )


def other(state: State) -> State:
    """Weights of the same shapes that differ."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_training_writes_loads(family: str, tmp_path: Path) -> None:
    kind, path = FAMILIES[family], tmp_path / "checkpoint.pth"
    state = kind.state()
    save_file(state, tmp_path / "published.safetensors")
    expected = bytes_of(kind.load(tmp_path / "published.safetensors"))
    for what, write in WRITTEN.items():
        torch.save(write(state), path)
        assert same(bytes_of(kind.load(path)), expected), what


@pytest.mark.parametrize(
    "names",
    [("model", "ema"), ("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema_state_dict")],
)
@pytest.mark.parametrize("family", ["llamagen", "vq", "var", "mar"])
def test_trained_or_averaged_weights_in_either_order(
    family: str, names: tuple[str, str], tmp_path: Path
) -> None:
    kind, path = FAMILIES[family], tmp_path / "checkpoint.pth"
    state = kind.state()
    torch.save(state, path)
    expected = bytes_of(kind.load(path))
    trained, averaged = (other(state), state) if kind.averaged else (state, other(state))
    for content in ({names[0]: trained, names[1]: averaged}, {names[1]: averaged, names[0]: trained}):
        torch.save(content, path)
        assert same(bytes_of(kind.load(path)), expected)


def test_both_in_one_level(tmp_path: Path) -> None:
    """As ema-pytorch writes them: told apart by the front of their names."""
    kind, path = FAMILIES["var"], tmp_path / "checkpoint.pth"
    state = kind.state()
    torch.save(
        {**named("ema_model.", other(state)), **named("online_model.", state), "step": torch.tensor(1)}, path
    )
    found = bytes_of(kind.load(path))
    torch.save(state, path)
    assert same(found, bytes_of(kind.load(path)))


def test_a_whole_trainer_of_var_holds_its_image_tokenizer_too(tmp_path: Path) -> None:
    path = tmp_path / "ar-ckpt-last.pth"
    trainer = {"var_wo_ddp": FAMILIES["var"].state(), "vae_local": FAMILIES["multiscale vq"].state()}
    torch.save({"epoch": 1, "iter": 0, "trainer": trainer, "args": {}}, path)
    assert isinstance(FAMILIES["var"].load(path), VARTransformer)
    assert isinstance(FAMILIES["multiscale vq"].load(path), MultiScaleVQModel)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_wrappers_use_are_no_names_of_ours(family: str) -> None:
    """They are taken off wherever they stand."""
    taken = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    assert not any(taken & set(name.split(".")) for name in FAMILIES[family].state())


def test_a_layer_of_another_network_is_no_wrapper(tmp_path: Path) -> None:
    torch.save({"layers.0.fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="another kind of model"):
        FAMILIES["eagle"].load(tmp_path / "other.pth")


NO_WEIGHTS = {
    "<!DOCTYPE html><html>": "is a web page, not a weights file",
    "\ufeff\n  <html><body>Sign in</body></html>": "is a web page, not a weights file",
    "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "is a web page, not a weights file",
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "pointer of git-lfs",
    "Entry not found": r"is a text \('Entry not found'\), not a weights file",
    '{"error": "Repository not found"}': "is a text .* not a weights file",
}


@pytest.mark.parametrize("ending", [".pth", ".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("text", NO_WEIGHTS)
def test_downloads_that_went_wrong(text: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_text(text, encoding="utf-8")
    for kind in FAMILIES.values():
        with pytest.raises(CheckpointError, match=NO_WEIGHTS[text]) as caught:
            kind.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_safetensors_under_another_ending(tmp_path: Path) -> None:
    save_file(FAMILIES["llamagen"].state(), tmp_path / "weights.pt")
    assert isinstance(FAMILIES["llamagen"].load(tmp_path / "weights.pt"), LlamaGenTransformer)
