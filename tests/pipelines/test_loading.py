"""How models are named and with which options they load, alike for shipped, published and saved ones; `from_pipe`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.models.test_var_parity import GOLDEN
from varaccel import AutoPipeline, LlamaGenPipeline, MARPipeline, VARPipeline
from varaccel.errors import CheckpointError, InputError, VaraccelError
from varaccel.pipelines.placement import open_pipeline

CLASSES: dict[str, Any] = {"c2i": LlamaGenPipeline, "var-class": VARPipeline, "mar-class": MARPipeline}
SHIPPED = {"mini-llamagen": "c2i", "mini-var": "var-class", "mini-mar": "mar-class"}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny models ship in place of the small ones; the current folder is empty. Returns it."""
    for name, kind in SHIPPED.items():
        tiny.pipeline(kind).save_pretrained(tmp_path / "weights" / name)
    (tmp_path / "weights" / "manifest.json").write_text(
        json.dumps({"models": {model: {} for model in SHIPPED}})
    )
    monkeypatch.setattr("varaccel.shipped.weights_folder", lambda: tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    """The hub is this machine: `var-d16` is the recorded network. Returns what was asked of it."""
    asked: list[tuple[str, str, dict[str, Any]]] = []
    files = {"var_d16.pth": "var_base.safetensors", "vae_ch160v4096z32.pth": "vae_b.safetensors"}

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(GOLDEN / files[name])

    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", download)
    return asked


# -- names ---------------------------------------------------------------------------------------------


def own_copy(name: str) -> None:
    """A folder of one's own, with another setting by which it is known."""
    kind = SHIPPED.get(name, "var-class")
    pipe = tiny.new_pipeline(kind)
    pipe.register_to_config(guidance_scale=9.0)
    pipe.save_pretrained(name)


def is_own(pipe: Any) -> bool:
    return bool(pipe.config.guidance_scale == 9.0)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_path_means_the_folder(name: str, shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_copy(name)
    os.chdir(shipped.parent)
    named: list[Any] = [f"./here/{name}", f"here/../here/{name}", Path("here") / name, shipped / name]
    os.chdir(shipped)
    written: list[Any] = [
        f"./{name}",
        f"{name}/",
        f".//{name}/",
        Path(name),
        Path(f"./{name}"),
        f"../here/{name}",
    ]
    written.append(str(Path(name).absolute()))
    for loader in (AutoPipeline, CLASSES[SHIPPED[name]]):
        for path in written:
            assert is_own(loader.from_pretrained(path)), path
        os.chdir(shipped.parent)
        for path in named:
            assert is_own(loader.from_pretrained(path)), path
        os.chdir(shipped)
    assert is_own(open_pipeline(f"./{name}", quiet=True))
    assert not [record for record in caplog.records if record.name.startswith("varaccel")]


@pytest.mark.parametrize("loader", [AutoPipeline.from_pretrained, VARPipeline.from_pretrained, open_pipeline])
def test_a_bare_name_means_the_shipped_model_and_one_message_names_the_folder(
    loader: Any, shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_copy("mini-var")
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        assert not is_own(loader("mini-var"))
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("varaccel")]
    assert str(shipped / "mini-var") in told
    assert "write ./mini-var" in told


def test_no_message_where_nothing_is_hidden(shipped: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shipped / "mini-var").mkdir()  # outputs, no model
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        AutoPipeline.from_pretrained("mini-var")
        os.chdir(shipped.parent / "weights")  # the shipped folder itself
        AutoPipeline.from_pretrained("mini-var")
    assert not [record for record in caplog.records if record.name.startswith("varaccel")]


def test_published_names_likewise(shipped: Path, published: Any, caplog: pytest.LogCaptureFixture) -> None:
    own_copy("var-d16")
    assert is_own(AutoPipeline.from_pretrained("./var-d16"))
    assert is_own(AutoPipeline.from_pretrained(Path("var-d16")))
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        assert not is_own(AutoPipeline.from_pretrained("var-d16"))
    assert str(shipped / "var-d16") in caplog.text
    assert len(published) == 2


def test_the_command_line_does_the_same(
    shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from varaccel.__main__ import main

    own_copy("mini-var")
    seen = []
    monkeypatch.setattr(
        VARPipeline, "_checked_call", lambda self, *a, **k: seen.append(is_own(self)) or 1 / 0
    )
    for model in ("./mini-var", "mini-var/", "mini-var"):
        monkeypatch.setattr("sys.argv", ["varaccel", "generate", "goldfish", "--model", model])
        with pytest.raises(ZeroDivisionError):
            main()
    assert seen == [True, True, False]


@pytest.mark.parametrize("name", ["./mini-var", "mini-var/", Path("mini-var"), "~/none", "/none/mini-var"])
def test_a_path_that_leads_nowhere_is_not_taken_for_a_name(name: Any, shipped: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model folder"):
        AutoPipeline.from_pretrained(name)


def test_the_home_folder(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_copy("mini-var")
    monkeypatch.setenv("HOME", str(shipped))
    assert is_own(AutoPipeline.from_pretrained("~/mini-var"))


def test_names_that_are_none(shipped: Path) -> None:
    for name in (None, 3, b"mini-var"):
        with pytest.raises(InputError, match="named by a string or a path"):
            AutoPipeline.from_pretrained(name)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"published model; load it with varaccel\.AutoPipeline"):
        VARPipeline.from_pretrained("var-d16")


# -- options -------------------------------------------------------------------------------------------


def sources(shipped: Path) -> list[Any]:
    own_copy("mini-var")
    return ["mini-var", "./mini-var", "var-d16"]


@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16", "fp16", "half"])
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_number_types(option: str, value: Any, shipped: Path, published: Any) -> None:
    for name in sources(shipped):
        pipe: Any = AutoPipeline.from_pretrained(name, **{option: value})
        assert pipe.transformer.dtype == torch.float16
        # as the authors run it
        assert pipe.vq_model.dtype == (torch.float32 if name == "var-d16" else torch.float16)


def test_number_types_by_component(shipped: Path, published: Any) -> None:
    for name in sources(shipped):
        pipe: Any = AutoPipeline.from_pretrained(name, dtype={"vq_model": "bfloat16", "default": "float64"})
        assert pipe.vq_model.dtype == torch.bfloat16
        assert pipe.transformer.dtype == torch.float64


@pytest.mark.parametrize(
    "options",
    [
        {"use_safetensors": True},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"device_map": torch.device("cpu")},
        {"variant": None},
        {"token": "secret", "revision": "main", "cache_dir": "there", "local_files_only": True},
        {"force_download": False, "token": None},
        {"dtype": None, "torch_dtype": "float32"},
    ],
    ids=str,
)
def test_usual_options_are_taken_by_all(options: dict[str, Any], shipped: Path, published: Any) -> None:
    for name in sources(shipped):
        pipe = AutoPipeline.from_pretrained(name, **options)
        assert isinstance(pipe, VARPipeline)
        assert pipe.transformer.dtype == torch.float32
    if "token" in options:
        assert [asked for *_, asked in published] == [options] * 2


def test_settings_and_components(shipped: Path, published: Any) -> None:
    wide: Any = AutoPipeline.from_pretrained("var-d16")
    published.clear()
    for name in sources(shipped):
        own: Any = wide.vq_model if name == "var-d16" else tiny.multiscale_vq(seed=4)
        pipe: Any = AutoPipeline.from_pretrained(name, guidance_scale=4.5, top_k=3, vq_model=own)
        assert (pipe.config.guidance_scale, pipe.config.top_k) == (4.5, 3)
        assert pipe.vq_model is own
    assert [file for _, file, _ in published] == ["var_d16.pth"], "the other file was not needed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp99"}, "unknown dtype 'fp99'"),
        ({"torch_dtype": torch.int8}, r"unknown dtype 'torch\.int8'"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "differ; pass dtype alone"),
        ({"device_map": "auto"}, "device_map='auto' is no device"),
        ({"device_map": {"": "cpu"}}, "is no device"),
        ({"guidance_scael": 3.0}, "did you mean 'guidance_scale'"),
        ({"safety_checker": None}, "unknown option of VARPipeline 'safety_checker'"),
        ({"variant": "fp16"}, "variant"),
        ({"quantization_config": 3}, "quantization_config"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_one_sentence(
    options: dict[str, Any], message: str, shipped: Path, published: Any
) -> None:
    for name in sources(shipped):
        with pytest.raises(VaraccelError, match=message) as caught:
            AutoPipeline.from_pretrained(name, **options)
        assert "\n" not in str(caught.value)


def test_single_files_take_them_too(tmp_path: Path) -> None:
    save_file(tiny.transformer("c2i").state_dict(), tmp_path / "gpt_256.safetensors")
    common: dict[str, Any] = {"vq_model": tiny.vq_model(), "num_heads": 4, "grid_size": tiny.GRID}
    path = tmp_path / "gpt_256.safetensors"
    pipe = LlamaGenPipeline.from_single_file(
        path, **common, torch_dtype="bfloat16", device_map="cpu", top_k=3
    )
    assert (pipe.transformer.dtype, pipe.vq_model.dtype) == (torch.bfloat16, torch.float32)
    assert pipe.config.top_k == 3
    with pytest.raises(InputError, match="did you mean 'top_k'"):
        LlamaGenPipeline.from_single_file(path, **common, topk=3)


@pytest.mark.parametrize(
    "call", [{"dtype": "bfloat16"}, {"torch_dtype": "bf16"}, ("cpu", "bfloat16"), ("bfloat16",)]
)
def test_a_pipeline_moves_to_a_named_type(call: Any) -> None:
    pipe: Any = tiny.new_pipeline("c2i")
    moved = pipe.to(**call) if isinstance(call, dict) else pipe.to(*call)
    assert moved is pipe
    assert pipe.transformer.dtype == pipe.vq_model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'fp99'"):
        pipe.to(dtype="fp99")


def test_a_revision_of_a_repository_is_not_asked_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, options.get("revision")))
        if len(asked) == 3:
            raise OSError("offline")
        return "file"

    monkeypatch.setattr("varaccel.pipelines.published.hf_hub_download", download)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        AutoPipeline.from_pretrained("var-code-8", revision="abc")
    assert asked == [("Zigeng/VAR_CoDe", "abc"), ("FoundationVision/var", None), ("Zigeng/VAR_CoDe", "abc")]


def test_a_revision_of_what_lies_here_changes_nothing_and_says_so(
    shipped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="varaccel"):
        AutoPipeline.from_pretrained("mini-var", revision="v2")
    assert [r.getMessage() for r in caplog.records if "revision='v2' changes nothing" in r.getMessage()]


@pytest.mark.parametrize("text", ["<html>", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_folder_with_a_text_in_the_place_of_weights(text: str, tmp_path: Path) -> None:
    tiny.pipeline("c2i").save_pretrained(tmp_path)
    next((tmp_path / "vq_model").glob("*.safetensors")).write_text(text)
    with pytest.raises(CheckpointError, match=r"is a web page|pointer of git-lfs") as caught:
        AutoPipeline.from_pretrained(tmp_path)
    assert "vq_model" in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("kind", "component"),
    [
        ("c2i", "transformer"),
        ("c2i", "vq_model"),
        ("t2i", "text_encoder"),
        ("var-class", "refiner"),
        ("mar-class", "vae"),
    ],
)
def test_networks_saved_under_a_wrapper(kind: str, component: str, prefix: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline(kind)
    pipe.save_pretrained(tmp_path)
    file = next((tmp_path / component).glob("*.safetensors"))
    state = load_file(file)
    save_file({f"{prefix}{name}": value for name, value in state.items()}, file, metadata={"format": "pt"})
    loaded: Any = AutoPipeline.from_pretrained(tmp_path)
    ours = getattr(loaded, component).state_dict()
    assert ours.keys() == getattr(pipe, component).state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.items())
    half: Any = AutoPipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert getattr(half, component).dtype == torch.bfloat16


@pytest.mark.parametrize("lost", [1, 3])
def test_a_network_that_lacks_weights_is_not_filled_with_noise(lost: int, tmp_path: Path) -> None:
    tiny.pipeline("var-class").save_pretrained(tmp_path)
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    state = load_file(file)
    for name in sorted(state)[:lost]:
        del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformer lacks .*save the model again"):
        AutoPipeline.from_pretrained(tmp_path)


# -- from_pipe -----------------------------------------------------------------------------------------

KINDS = ("c2i", "t2i", "var-class", "var-caption", "infinity", "mar-class", "mar-caption")


class OwnVAR(VARPipeline):
    """A class of one's own that hands everything on."""

    def __init__(self, transformer: Any, vq_model: Any, **others: Any) -> None:
        super().__init__(transformer, vq_model, **others)


class Plain(DiffusionPipeline):
    """A class of diffusers' own kind that knows no settings."""

    def __init__(self, transformer: Any, vq_model: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vq_model=vq_model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_and_setting_is_carried(kind: str) -> None:
    pipe = tiny.pipeline(kind)
    again = type(pipe).from_pipe(pipe)
    assert again.components.keys() == pipe.components.keys()
    assert all(part is again.components[name] for name, part in pipe.components.items())
    assert all(again.config[k] == value for k, value in pipe.config.items() if not k.startswith("_"))
    others = {"class_names": None} if "class_names" in pipe.config else {}
    changed = type(pipe).from_pipe(pipe, guidance_scale=5.5, **others)
    assert {name: changed.config[name] for name in ("guidance_scale", *others)} == {
        "guidance_scale": 5.5,
        **others,
    }
    assert pipe.config.guidance_scale != 5.5


def test_other_components(tmp_path: Path) -> None:
    pipe: Any = tiny.pipeline("var-caption")
    other = tiny.multiscale_vq(seed=7)
    again = VARPipeline.from_pipe(pipe, vq_model=other, refiner=None)
    assert again.vq_model is other
    assert again.refiner is None
    assert again.text_encoder is pipe.text_encoder
    assert again.tokenizer is pipe.tokenizer


def test_settings_come_back_from_a_class_without_them() -> None:
    pipe: Any = tiny.pipeline("c2i")
    there = Plain(pipe.transformer, pipe.vq_model)
    # what diffusers' own from_pipe does with settings that the class does not know
    there.register_to_config(_guidance_scale=pipe.config.guidance_scale, _class_names=pipe.config.class_names)
    back = LlamaGenPipeline.from_pipe(there)
    assert back.transformer is pipe.transformer
    assert list(back.config.class_names) == list(pipe.config.class_names)
    assert back.config.guidance_scale == pipe.config.guidance_scale


def test_a_class_that_hands_on_its_arguments() -> None:
    pipe: Any = tiny.pipeline("var-class")
    again = OwnVAR.from_pipe(pipe, top_k=2)
    assert again.refiner is pipe.refiner
    assert again.config.top_k == 2
    assert again.config.class_names == pipe.config.class_names


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}])
def test_number_type_of_the_second_pipeline(option: dict[str, Any]) -> None:
    pipe = tiny.new_pipeline("mar-caption")
    again: Any = MARPipeline.from_pipe(pipe, **option)
    assert again.transformer.dtype == again.text_encoder.dtype == torch.bfloat16
    assert next(again.transformer.head.parameters()).dtype == torch.float32, "the head keeps its precision"
    assert MARPipeline.from_pipe(pipe).transformer.dtype == torch.bfloat16, "as it is, unless said"


def test_what_from_pipe_does_not_know() -> None:
    with pytest.raises(InputError, match="did you mean 'refiner'"):
        VARPipeline.from_pipe(tiny.pipeline("var-class"), refner=None)
    with pytest.raises(InputError, match="one dtype for all"):
        VARPipeline.from_pipe(tiny.pipeline("var-class"), dtype={"default": torch.float16})
