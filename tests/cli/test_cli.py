"""The command line as a user types it: what is written, what is printed, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from tests.tiny import CLASSES, GRID, new_pipeline, pipeline
from varaccel import Jacobi, ZipAR
from varaccel.__main__ import main
from varaccel.accelerators import ACCELERATORS
from varaccel.engine.option_text import parse_options
from varaccel.errors import InputError
from varaccel.evaluation.bench import grids
from varaccel.hosts.masked.job import MaskedJob
from varaccel.pipelines.catalog import PUBLISHED
from varaccel.pipelines.llamagen import LlamaGenPipeline
from varaccel.pipelines.mar import MARPipeline
from varaccel.pipelines.placement import move, quiet_loading

SIZE = GRID * 2
"""Side of an image of the tiny models in pixels."""


class Run(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs `varaccel` inside this process, in a folder of its own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: object) -> Run:
        self.monkeypatch.setattr(sys, "argv", ["varaccel", *map(str, arguments)])
        self.capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return Run(code or 0, *self.capsys.readouterr())

    @property
    def files(self) -> list[str]:
        """Everything in the folder, hidden and temporary files included."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*"))


@pytest.fixture
def varaccel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="session")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t2i"
    pipeline("t2i").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def c2i(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "c2i"
    pipeline("c2i").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mar"
    pipeline("mar-caption").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def c2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "var"
    pipeline("var-class").save_pretrained(folder)
    return folder


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def assert_sentence(run: Run, *words: str) -> None:
    """The library refused: one sentence on stderr after any progress, nothing on stdout, exit code 2."""
    assert run.code == 2
    assert run.out == ""
    sentence = run.err.splitlines()[-1]
    assert sentence.startswith("varaccel: ")
    assert "Traceback" not in run.err
    for word in words:
        assert word in sentence


# -- generate ------------------------------------------------------------------------------------------


def test_one_image(varaccel: Shell, t2i: Path) -> None:
    run = varaccel("generate", "a red sphere", "--model", t2i, "--seed", 5)
    assert run.code == 0
    assert varaccel.files == ["image.png"]
    expected = pipeline("t2i")("a red sphere", seed=5).images[0]
    assert read_image(varaccel.folder / "image.png").tobytes() == expected.tobytes()
    lines = run.out.splitlines()
    assert lines[0] == "image.png"
    assert lines[1].startswith(f"plain(): 1 images of {GRID**2} tokens in {GRID**2} passes")


def test_same_seed_same_bytes(varaccel: Shell, t2i: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert varaccel("generate", "a cube", "--model", t2i, "--seed", seed, "--out", name).code == 0
    first, again, other = ((varaccel.folder / name).read_bytes() for name in varaccel.files)
    assert first == again
    assert first != other


def test_grid_and_single_images(varaccel: Shell, t2i: Path) -> None:
    run = varaccel(
        "generate", "a red cube", "-n", 4, "--separate", "--seed", 3, "--model", t2i, "--out", "sub/x.png"
    )
    assert run.code == 0
    singles = [f"sub/x-{i}.png" for i in range(4)]
    assert varaccel.files == ["sub", *singles, "sub/x.png"]
    sheet = read_image(varaccel.folder / "sub/x.png")
    assert sheet.size == (2 * SIZE + 2, 2 * SIZE + 2)
    for index, name in enumerate(singles):
        alone = pipeline("t2i")("a red cube", seed=3 + index).images[0]
        assert read_image(varaccel.folder / name).tobytes() == alone.tobytes()
        row, column = divmod(index, 2)
        left, top = column * (SIZE + 2), row * (SIZE + 2)
        assert sheet.crop((left, top, left + SIZE, top + SIZE)).tobytes() == alone.tobytes()


def test_several_prompts_and_no_separate_files(varaccel: Shell, t2i: Path) -> None:
    run = varaccel("generate", "a red cube", "a sphere", "-n", 3, "--model", t2i, "--json")
    assert json.loads(run.out)["images"] == 6
    assert varaccel.files == ["image.png"]


def test_classes(varaccel: Shell, c2i: Path) -> None:
    assert varaccel("generate", "hen", "4", "--model", c2i, "--seed", 0).code == 0
    expected = pipeline("c2i")([4, 4], seed=0).images
    sheet = read_image(varaccel.folder / "image.png")
    assert sheet.crop((0, 0, SIZE, SIZE)).tobytes() == expected[0].tobytes()


def test_json_is_all_that_is_printed(varaccel: Shell, t2i: Path) -> None:
    run = varaccel(
        *("generate", "a red sphere", "--model", t2i, "--json", "--seed", 7),
        *("-a", "zipar", "-o", "window=2", "-o", "mode=published"),
    )
    assert run.code == 0
    assert run.err == ""
    cost = json.loads(run.out)
    accelerator = ZipAR(2, mode="published")
    stats = json.loads(
        json.dumps(pipeline("t2i")("a red sphere", seed=7, accelerator=accelerator).stats.to_dict())
    )
    timed = ("seconds", "total_seconds", "first_pass_seconds")
    told = {k: v for k, v in cost.items() if k not in timed}
    assert told == {
        **{k: v for k, v in stats.items() if k not in timed},
        "out": "image.png",
        "seed": 7,
    }
    assert cost["options"] == {"window": 2, "mode": "published"}
    assert set(cost["seconds"]) == {"text", "tokens", "decode"}
    expected = pipeline("t2i")("a red sphere", seed=7, accelerator=accelerator).images[0]
    assert read_image(varaccel.folder / "image.png").tobytes() == expected.tobytes()


def test_quiet_and_not(varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert varaccel("generate", "a cube", "--model", t2i).err == "", "there is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert varaccel("generate", "a cube", "--model", t2i, "--quiet").err == ""
    assert "100%" in varaccel("generate", "a cube", "--model", t2i).err, "bars are back in the same process"


def test_quiet_runs_still_warn(varaccel: Shell, t2i: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert varaccel("generate", "a zebra", "--model", t2i, "--json").code == 0
    assert ["zebra" in record.getMessage() for record in caplog.records] == [True]


def test_sampling_options_arrive(varaccel: Shell, t2i: Path) -> None:
    options = ("--guidance-scale", 1.5, "--temperature", 0.7, "--top-k", 5, "--top-p", 0.9)
    assert varaccel("generate", "a cube", "--model", t2i, *options).code == 0
    expected = pipeline("t2i")(
        "a cube", seed=0, guidance_scale=1.5, temperature=0.7, top_k=5, top_p=0.9
    ).images[0]
    assert read_image(varaccel.folder / "image.png").tobytes() == expected.tobytes()


def test_endless_prompt(varaccel: Shell, t2i: Path) -> None:
    assert varaccel("generate", "a red sphere " * 4000, "--model", t2i).code == 0
    assert varaccel.files == ["image.png"]


def test_other_formats(varaccel: Shell, t2i: Path) -> None:
    for name in ("a.jpg", "b.WEBP"):
        assert varaccel("generate", "a cube", "--model", t2i, "--out", name).code == 0
        assert read_image(varaccel.folder / name).size == (SIZE, SIZE)


def test_options_of_masked_models_arrive(varaccel: Shell, mar: Path) -> None:
    options = ("--num-iterations", 5, "--head-steps", 3, "--temperature", 0.9, "--guidance-scale", 1.5)
    run = varaccel("generate", "a red sphere", "--model", mar, *options)
    assert run.code == 0
    assert f"{GRID**2} tokens in 5 passes" in run.out
    expected = pipeline("mar-caption")(
        "a red sphere", seed=0, num_iterations=5, head_steps=3, temperature=0.9, guidance_scale=1.5
    ).images[0]
    assert read_image(varaccel.folder / "image.png").tobytes() == expected.tobytes()


# -- generate, refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cube", "--model", "mini-lamagen-3"], ["unknown model", "mini-lamagen-3"]),
        (["a cube", "--model", "llamagen-c2i-xl-348"], ["did you mean 'llamagen-c2i-xl-384'"]),
        (["a cube", "--model", "."], ["model_index.json"]),
        (["a cube", "-a", "zippar"], ["unknown accelerator", "did you mean 'zipar'"]),
        (["a cube", "-a", "zipar", "-o", "windw=3"], ["did you mean 'window'"]),
        (["a cube", "-a", "zipar", "-o", "window"], ["key=value", "'window'"]),
        (["a cube", "-a", "zipar", "-o", "=3"], ["key=value"]),
        (["a cube", "-a", "zipar", "-o", "window=0"], ["window", "of at least 1"]),
        (["a cube", "-a", "zipar", "-o", "window=two"], ["window", "'two'"]),
        (["a cube", "-a", "zipar", "-o", "window=NaN"], ["window", "nan"]),
        (["a cube", "-a", "zipar", "-o", "window=" + "1" * 5000], ["window"]),
        (["a cube", "-o", "window=2"], ["unknown option of accelerator 'plain'"]),
        (["a cube", "", "--model", "T2I"], ["prompt", "no text"]),
        ([" \n", "--model", "T2I"], ["prompt", "no text"]),
        (["a cube", "-n", "0", "--model", "T2I"], ["num_images_per_prompt", "at least 1"]),
        (["a cube", "-n", "-2", "--model", "T2I"], ["num_images_per_prompt", "at least 1"]),
        (["a cube", "--seed", "-1", "--model", "T2I"], ["seed", "-1"]),
        (["a cube", "--seed", str(2**63), "--model", "T2I"], ["seed"]),
        (["a cube", "--guidance-scale", "nan", "--model", "T2I"], ["guidance_scale", "nan"]),
        (["a cube", "--temperature", "-1", "--model", "T2I"], ["temperature"]),
        (["a cube", "--top-p", "1.5", "--model", "T2I"], ["top_p"]),
        (["a cube", "--num-iterations", "8", "--model", "T2I"], ["T2I has no --num-iterations"]),
        (["a cube", "--head-steps", "8", "--model", "C2I"], ["C2I has no --head-steps"]),
        (["a cube", "--top-k", "5", "--model", "MAR"], ["MAR has no --top-k"]),
        (["a cube", "--num-iterations", "17", "--model", "MAR"], ["16"]),
        (["a cube", "-a", "jacobi", "--model", "MAR"], ["does not work on mar models"]),
        (["goldfisch", "--model", "C2I"], ["unknown class", "did you mean 'goldfish'"]),
        (["a cube", "--out", "x.unknown"], ["x.unknown", ".png"]),
        (["a cube", "--out", "x"], ["x must end", ".png"]),
        (["a cube", "--out", "x.psd"], ["x.psd", ".png"]),
        (["a cube", "--out", "."], ["is a folder"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_refusals(
    varaccel: Shell, t2i: Path, c2i: Path, mar: Path, arguments: list[str], words: list[str]
) -> None:
    folders = {"T2I": t2i, "C2I": c2i, "MAR": mar}
    for name, folder in folders.items():
        words = [word.replace(name, str(folder)) for word in words]
    assert_sentence(varaccel("generate", *(folders.get(a, a) for a in arguments)), *words)
    assert varaccel.files == []


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "a cube", "-n", "many"], ["generate", "a cube", "--sed", "1"], ["draw"]],
    ids=" ".join,
)
def test_wrong_usage(varaccel: Shell, arguments: list[str]) -> None:
    run = varaccel(*arguments)
    assert run.code == 2
    assert "Usage" in run.err
    assert "Traceback" not in run.err


def test_path_is_refused_before_the_model_is_loaded(varaccel: Shell) -> None:
    assert_sentence(varaccel("generate", "a cube", "--model", "not there", "--out", "x.unknown"), "x.unknown")


def test_folder_that_cannot_be_made(varaccel: Shell, t2i: Path) -> None:
    (varaccel.folder / "file").write_text("in the way")
    run = varaccel("generate", "a cube", "--model", t2i, "--out", "file/x.png", "--quiet")
    assert_sentence(run, "file/x.png")
    assert varaccel.files == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(varaccel: Shell, t2i: Path) -> None:
    (varaccel.folder / "locked").mkdir(mode=0o500)
    assert_sentence(varaccel("generate", "a cube", "--model", t2i, "--out", "locked/x.png"), "locked/x.png")
    assert varaccel.files == ["locked"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "file/x.png"], ["file/x.png", "Not a directory"]),
        (["--out", "file/new/x.png"], ["file/new/x.png", "Not a directory"]),
        (["--out", "x.msp"], ["x.msp", "MSP"]),
        (["--out", "x.h5"], ["x.h5", "HDF5"]),
        (["--out", "a" * 300 + ".png"], ["too long"]),
        (["--out", "a" * 248 + ".png", "--separate", "-n", "1000"], ["too long"]),
        (["--out", "a" * 248 + ".png", "--map"], ["too long"]),
        (["--out", "x.webp", "-n", "9000000"], ["x.webp", "name another format"]),
        (["-n", str(10**12)], ["out of memory", "make fewer"]),
        (["-n", str(10**12), "--out", "x.webp"], ["x.webp"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_what_cannot_be_written_is_found_before_drawing(
    varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr(LlamaGenPipeline, "_run", fail)
    (varaccel.folder / "file").write_text("in the way")
    assert_sentence(varaccel("generate", "a cube", "--model", t2i, "--quiet", *arguments), *words)
    assert varaccel.files == ["file"]


def test_a_name_of_full_length(varaccel: Shell, t2i: Path) -> None:
    name = "猫" * 82 + ".png"
    assert varaccel("generate", "a cube", "--model", t2i, "--quiet", "--out", name).code == 0
    assert varaccel.files == [name]


def test_out_through_a_link(varaccel: Shell, t2i: Path) -> None:
    (varaccel.folder / "store").mkdir()
    (varaccel.folder / "latest.png").symlink_to("store/real.png")
    assert varaccel("generate", "a cube", "--model", t2i, "--quiet", "--out", "latest.png").code == 0
    assert (varaccel.folder / "latest.png").is_symlink()
    assert varaccel.files == ["latest.png", "store", "store/real.png"]


def half_written(error: BaseException) -> Any:
    """A stand-in for `Image.save` that fails in the middle of the file, and tries of formats in memory do not."""
    whole = Image.Image.save

    def save(self: Image.Image, target: Any, *arguments: Any) -> None:
        if isinstance(target, BytesIO):
            return whole(self, target, *arguments)
        Path(target).write_bytes(b"half an image")
        raise error

    return save


def test_full_disk(varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (varaccel.folder / "image.png").write_bytes(b"older")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", half_written(full))
    run = varaccel("generate", "a cube", "--model", t2i, "--quiet")
    assert_sentence(run, "image.png", "No space left on device")
    assert run.err.count("\n") == 1
    assert varaccel.files == ["image.png"]
    assert (varaccel.folder / "image.png").read_bytes() == b"older"


def test_interrupted_while_writing(varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "save", half_written(KeyboardInterrupt()))
    run = varaccel("generate", "a cube", "--model", t2i)
    assert run.code == 130
    assert "Traceback" not in run.err
    assert varaccel.files == []


def test_out_of_memory(varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaGenPipeline, "_run", fail)
    assert_sentence(varaccel("generate", "a cube", "-n", 8, "--model", t2i), "fewer than 8 images")


def test_a_fault_of_the_library_is_not_disguised(
    varaccel: Shell, t2i: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LlamaGenPipeline, "_generate", fail)
    with pytest.raises(ZeroDivisionError):
        varaccel("generate", "a cube", "--model", t2i)


# -- the other commands --------------------------------------------------------------------------------


def test_models_lists_everything(varaccel: Shell) -> None:
    run = varaccel("models")
    assert run.code == 0
    words = run.out.split()
    for name in (*PUBLISHED, *ACCELERATORS):
        assert name in words, f"{name} is not listed in one piece"


def test_demo(varaccel: Shell, t2i: Path) -> None:
    prompts = ["a red sphere", "a blue cube left of a red sphere"]
    run = varaccel(
        *("demo", "--model", t2i, "--out", "shown", "-a", "zipar:window=2", "-a", "jacobi:window=3"),
        *(part for prompt in prompts for part in ("--prompt", prompt)),
    )
    assert run.code == 0
    assert varaccel.files == ["shown", "shown/side-by-side.png"]
    plain, zipar, jacobi = run.out.splitlines()[-3:]
    assert plain.startswith(f"  plain(), lossless: {GRID**2} passes, 1.0 tokens per pass")
    assert plain.endswith("1.00x plain")
    assert f"zipar(window=2), approximate: {GRID + (GRID - 1) * 2} passes" in zipar
    assert "jacobi(window=3), lossless" in jacobi
    sheet = read_image(varaccel.folder / "shown/side-by-side.png")
    tile, margin, line = 256, 8, 18
    head, text = line + margin, 2 * line + 2 * margin  # one line of titles, two of labels
    assert sheet.size == (margin + 2 * (tile + margin), head + 3 * (tile + text))
    for row, accelerator in enumerate(("plain", ZipAR(2), Jacobi(3))):
        images = pipeline("t2i")(prompts, seed=0, accelerator=accelerator).images
        for column, image in enumerate(images):
            left, top = margin + column * (tile + margin), head + row * (tile + text)
            shown = sheet.crop((left, top, left + tile, top + tile))
            assert shown.tobytes() == image.resize((tile, tile), Image.Resampling.LANCZOS).tobytes()


def test_demo_of_a_model_that_draws_classes(varaccel: Shell, c2i: Path) -> None:
    assert varaccel("demo", "--model", c2i, "--out", ".").code == 0
    assert varaccel.files == ["side-by-side.png"]


def test_demo_of_a_masked_model(varaccel: Shell, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ("feature_cache:refresh=4", "fewer_steps:iterations=4,head_steps=2")
    monkeypatch.setattr(grids, "DEFAULTS", {MaskedJob: grids.Defaults(demo=shown)})
    run = varaccel("demo", "--model", mar, "--out", ".", "--prompt", "a red sphere")
    assert run.code == 0
    plain, cached, fewer = run.out.splitlines()[-3:]
    assert f"plain(), lossless: {GRID**2} passes" in plain, (
        "in as many iterations as the model does by itself"
    )
    assert "feature_cache(refresh=4), approximate" in cached
    assert "fewer_steps(iterations=4, head_steps=2), approximate: 4 passes" in fewer


def test_demo_refusals(varaccel: Shell, t2i: Path) -> None:
    assert_sentence(varaccel("demo", "--model", t2i, "-a", "zipar:window=0"), "window")
    (varaccel.folder / "file").write_text("in the way")
    assert_sentence(varaccel("demo", "--model", "not there", "--out", "file"), "side-by-side.png")
    assert varaccel.files == ["file"]


# -- inpaint -------------------------------------------------------------------------------------------


def test_inpaint(varaccel: Shell, c2v: Path) -> None:
    """A photo that lies on its side, and a mask of strokes on a transparent layer of the upright one."""
    pipe, host = pipeline("var-class"), c2v
    side = pipe.image_size
    upright = Image.effect_noise((2 * side, 3 * side), 80).convert("RGB")
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    stored.save("photo.png", exif=stored.getexif())
    strokes = Image.new("LA", upright.size)
    strokes.paste((0, 255), (0, side, side, 2 * side))
    strokes.save("mask.png")
    run = varaccel("inpaint", "photo.png", "mask.png", "hen", "--model", host, "-o", "out.png", "--quiet")
    assert run.code == 0, run.err
    mask = Image.new("1", upright.size)
    mask.paste(1, (0, side, side, 2 * side))
    expected = pipe.inpaint(upright, mask, "hen", seed=0).images[0]
    assert read_image(varaccel.folder / "out.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bomb.png", "mask.png"], ["bomb.png cannot be read as an image", "decompression bomb"]),
        (["photo.png", "bomb.png"], ["bomb.png cannot be read as an image"]),
        (["text.png", "mask.png"], ["text.png cannot be read as an image"]),
        (["none.png", "mask.png"], ["none.png cannot be read as an image"]),
        ([".", "mask.png"], [". cannot be read as an image"]),
        (["photo.png", "mask.png", "-o", "text.png/x.png"], ["text.png/x.png", "Not a directory"]),
        (["photo.png", "mask.png", "-o", "x.msp"], ["x.msp"]),
        (["photo.png", "mask.png", "-n", str(10**12)], ["out of memory", "make fewer"]),
        (["photo.png", "wide.png"], ["the mask is 60 × 20 pixels but the image 40 × 40"]),
        (["photo.png", "hole.png"], ["alpha channel"]),
        (["photo.png", "black.png"], ["black everywhere"]),
    ],
    ids=" ".join,
)
def test_inpaint_refusals(varaccel: Shell, c2v: Path, arguments: list[str], words: list[str]) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    Path("bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    Path("text.png").write_text("no image")
    Image.new("RGB", (40, 40), "red").save("photo.png")
    Image.new("L", (40, 40), 255).save("mask.png")
    Image.new("L", (60, 20), 255).save("wide.png")
    Image.new("L", (40, 40)).save("black.png")
    hole = Image.new("RGBA", (40, 40), "white")
    hole.paste((0, 0, 0, 0), (10, 10, 20, 20))
    hole.save("hole.png")
    before = varaccel.files
    assert_sentence(
        varaccel("inpaint", *arguments[:2], "hen", *arguments[2:], "--model", c2v, "--quiet"), *words
    )
    assert varaccel.files == before


def test_maps_of_passes(varaccel: Shell, t2i: Path) -> None:
    arguments = (
        "generate",
        "a red sphere",
        "a cube",
        "--model",
        t2i,
        "-a",
        "jacobi",
        "--map",
        "--out",
        "p.png",
    )
    assert varaccel(*arguments).code == 0
    assert varaccel.files == ["p-map-0.png", "p-map-1.png", "p.png"]


def test_bench(varaccel: Shell, t2i: Path) -> None:
    run = varaccel(
        *("bench", "--model", t2i, "--images", 0, "--repeats", 2, "--batch", 1, "--batch", 2),
        *("-a", "zipar:window=1", "-a", "zipar:window=2,mode=masked", "--out", "new/bench.json"),
    )
    assert run.code == 0
    assert varaccel.files == ["new", "new/bench.json"]
    report = json.loads((varaccel.folder / "new/bench.json").read_text())
    settings = report["settings"]
    assert (settings["repeats"], settings["images"], settings["model"]) == (2, 0, str(t2i))
    assert settings["machine"]
    plain, *zipar = report["rows"]
    assert plain["accelerator"] == "plain"
    assert [speed["batch"] for speed in plain["speed"]] == [1, 2]
    assert plain["speed"][0]["passes"] == GRID**2
    assert plain["speed"][0]["speedup_spread"] == [1.0, 1.0]
    for row, window in zip(zipar, (1, 2), strict=True):
        assert row["options"]["window"] == window
        assert row["quality"] is None
        for speed in row["speed"]:
            assert speed["passes"] == GRID + (GRID - 1) * window
            assert len(speed["seconds"]) == 2
            assert speed["speedup_spread"][0] <= speed["speedup"] <= speed["speedup_spread"][1]
    words = run.out.split()
    assert words.count("lossless") == 2
    assert words.count("approximate") == 4
    for word in ("plain", "window=1", "window=2", "seconds", "speed-up"):
        assert word in words, f"{word} is cut off where the terminal has 80 columns"


def test_bench_with_images(varaccel: Shell, t2i: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = (
        *("bench", "--model", t2i, "--images", 4, "--scenes", 6, "--repeats", 1, "--out", "bench.json"),
        *("-a", "zipar:window=1"),
    )
    run = varaccel(*arguments, "--plot", "plot.png", "--samples", "samples.png")
    assert run.code == 0
    assert varaccel.files == ["bench.json", "plot.png", "samples.png"]
    assert run.out.splitlines()[-3:] == ["wrote bench.json", "wrote plot.png", "wrote samples.png"]
    assert "scenes-detector" in run.out
    written = (varaccel.folder / "bench.json").read_text()
    report = json.loads(written)
    for row in report["rows"]:
        assert row["quality"]["adherence"]["total"] == len(row["quality"]["correct"]) == 4
        assert row["quality"]["distance"]["value"] > 0
    assert report["truth"]["adherence"]["share"] > 0.5
    assert "of 6 true images" in report["settings"]["reference"]
    versus = report["rows"][1]["against_plain"]
    assert versus["distance_noise"] > 0
    assert varaccel(*arguments, "--resume").code == 0
    assert (varaccel.folder / "bench.json").read_text() == written
    shown = varaccel(*arguments, "--resume", "--markdown").out
    assert shown.startswith("Batch 1, ")
    assert "| zipar window=1 | approximate |" in shown
    assert_sentence(varaccel(*arguments, "--resume", "--seed", 1), "seed 0 instead of 1")
    assert (varaccel.folder / "bench.json").read_text() == written


def test_bench_of_a_masked_model(varaccel: Shell, mar: Path) -> None:
    arguments = (
        *("bench", "--model", mar, "--images", 4, "--scenes", 6, "--repeats", 1, "--out", "bench.json"),
        *("--num-iterations", 8, "--head-steps", 4, "--drawn-together", 2, "--dtype", "bfloat16"),
        *("-a", "cspd:draft_length=2", "-a", "feature_cache:refresh=2"),
    )
    run = varaccel(*arguments)
    assert run.code == 0, run.err
    report = json.loads((varaccel.folder / "bench.json").read_text())
    settings = report["settings"]
    assert settings["call"] == {"num_iterations": 8, "head_steps": 4}
    assert (settings["dtype"], settings["compiled"]) == ("bfloat16", False)
    plain, drafted, cached = report["rows"]
    assert plain["speed"][0]["passes"] == cached["speed"][0]["passes"] == 8
    assert drafted["speed"][0]["details"]["draft_passes"][0] > 0
    assert all(row["quality"]["adherence"]["total"] == 4 for row in report["rows"])
    for word in ("kept", "drafter", "bfloat16"):
        assert word in run.out
    assert_sentence(
        varaccel(*arguments, "--resume", "--head-steps", 5), "cannot be continued", "'head_steps': 5"
    )


def test_bench_of_compiled_networks(varaccel: Shell, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(MARPipeline, "compile", lambda pipe: compiled.append(pipe.transformer.dtype))
    monkeypatch.setattr(MARPipeline, "is_compiled", property(lambda pipe: bool(compiled)))
    run = varaccel(
        *("bench", "--model", mar, "--images", 0, "--repeats", 1, "--compile", "--dtype", "bfloat16"),
        *("--num-iterations", 2, "-a", "fewer_steps:iterations=1", "--out", "bench.json"),
    )
    assert run.code == 0
    assert compiled == [torch.bfloat16], "after the networks are in their precision and place"
    assert json.loads((varaccel.folder / "bench.json").read_text())["settings"]["compiled"] is True


def test_networks_that_decide_tokens_change_precision() -> None:
    pipe: Any = new_pipeline("mar-caption")
    move(pipe, "cpu", "bfloat16")
    assert pipe.transformer.dtype == pipe.draft_transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    assert next(pipe.text_encoder.parameters()).dtype == torch.float32
    assert pipe("a red sphere", seed=0, head_steps=2).stats.dtype == "bfloat16"


def test_bench_options_of_another_family(varaccel: Shell, t2i: Path) -> None:
    for option in ("--num-iterations", "--head-steps"):
        run = varaccel("bench", "--model", t2i, option, 4)
        assert_sentence(run, f"has no {option} to choose")


def test_bench_of_more_images_than_memory_holds(varaccel: Shell, t2i: Path) -> None:
    assert_sentence(varaccel("bench", "--model", t2i, "--batch", 10**12), "out of memory", "make fewer")


@pytest.mark.parametrize("option", ["--out", "--install"])
def test_a_drafter_that_cannot_be_written_is_not_trained(varaccel: Shell, option: str) -> None:
    (varaccel.folder / "file").write_text("in the way")
    run = varaccel("train", "drafter", "--token-ids", "tokens", "--target", "not there", option, "file")
    assert_sentence(run, "nothing could be written to file")
    assert varaccel.files == ["file"]


def test_bench_of_a_model_that_draws_classes(varaccel: Shell, c2i: Path) -> None:
    arguments = ("bench", "--model", c2i, "--repeats", 1, "-a", "zipar:window=2")
    assert_sentence(varaccel(*arguments, "--images", 5), "--images 0")
    run = varaccel(*arguments, "--images", 0, "--batch", len(CLASSES) + 1)
    assert run.code == 0
    assert varaccel.files == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-a", "zipar:window=2", "-a", "zippar:window=2"], ["'zippar:window=2'", "did you mean 'zipar'"]),
        (["-a", "zipar:window=0"], ["'zipar:window=0'", "of at least 1"]),
        (["-a", "zipar:window=2,4"], ["'zipar:window=2,4'", "key=value"]),
        (["--device", "cuba"], ["unknown device 'cuba'", "did you mean 'cuda'"]),
        (["--dtype", "float16"], ["unknown precision 'float16'", "bfloat16"]),
        (["--resume"], ["--resume", "--out"]),
        (["--out", "."], ["is a folder"]),
        (["--plot", "plot.what"], ["plot.what", ".png"]),
        (["--samples", "samples"], ["samples must end"]),
        (["--plot", "plot.png", "--images", "0"], ["--plot", "--images"]),
        (["--out", "file/x.json"], ["nothing could be written to file/x.json"]),
        (["--plot", "file/x.png"], ["nothing could be written to file/x.png"]),
        (["--samples", "x.msp"], ["x.msp"]),
        (["--samples", "a" * 300 + ".png"], ["too long"]),
        (["--out", "file", "--resume"], ["file cannot be continued"]),
        (["--out", "other.json", "--resume"], ["other.json cannot be continued", "no report"]),
    ],
    ids=" ".join,
)
def test_bench_refusals(varaccel: Shell, arguments: list[str], words: list[str]) -> None:
    """All of them before the model, which does not exist, is loaded."""
    (varaccel.folder / "file").write_text("in the way")
    (varaccel.folder / "other.json").write_text('{"measurements": []}')
    assert_sentence(varaccel("bench", "--model", "not there", *arguments), *words)
    assert varaccel.files == ["file", "other.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu(varaccel: Shell) -> None:
    assert_sentence(varaccel("bench", "--model", "not there", "--device", "cuda"), "no GPU", "--device cuda")


@pytest.mark.parametrize(
    "option",
    [
        *(("--batch", 0), ("--repeats", 0), ("--images", -1), ("--scenes", -1)),
        *(("--drawn-together", 0), ("--num-iterations", 0), ("--head-steps", 0)),
    ],
    ids=str,
)
def test_bench_counts(varaccel: Shell, option: tuple[str, int]) -> None:
    run = varaccel("bench", *option)
    assert run.code == 2
    assert option[0] in run.err


# -- parts ---------------------------------------------------------------------------------------------


def test_options_are_json_where_they_parse() -> None:
    pairs = ["a=1", "b=0.5", "c=true", "d=null", "e=masked", "f=", "g=x=y", 'h="1"', "i=[1]"]
    assert parse_options(pairs) == {
        **{"a": 1, "b": 0.5, "c": True, "d": None, "e": "masked"},
        **{"f": "", "g": "x=y", "h": "1", "i": [1]},
    }
    with pytest.raises(InputError, match="key=value"):
        parse_options(["a=1", "b"])


def test_progress_bars_return_after_a_failure() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    switches = (diffusers_logging, transformers_logging)
    before = [s.is_progress_bar_enabled() for s in switches]

    def fail() -> None:
        with quiet_loading():
            assert not any(s.is_progress_bar_enabled() for s in switches)
            raise InputError("no")

    with pytest.raises(InputError):
        fail()
    assert [s.is_progress_bar_enabled() for s in switches] == before


def test_module_from_outside() -> None:
    """`python -m varaccel`: help is quick, because it loads no network library."""
    code = (
        "import runpy, sys; sys.argv = ['varaccel', '--help']\n"
        "try: runpy.run_module('varaccel', run_name='__main__')\n"
        "finally: assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    for command in ("generate", "models", "demo", "bench"):
        assert command in run.stdout
