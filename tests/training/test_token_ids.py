"""Encoding an image cache as token ids: contents, resume, and the guard against mixing tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from varaccel.errors import CheckpointError, InputError
from varaccel.scenes.cache import CachedScenes, write_cache
from varaccel.tokenizers.vq import VQModel
from varaccel.training import token_ids as token_ids_module
from varaccel.training.images import to_images
from varaccel.training.shards import fingerprint
from varaccel.training.token_ids import (
    encode_cache,
    encode_pixels,
    main,
    precision_agreement,
    read_token_ids,
    token_ids_path,
)


def tiny(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(
        base_channels=8,
        channel_multipliers=(1, 1, 2),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=32,
        codebook_dim=4,
        norm_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_cache(folder, first_seed=0, count=10, size=32, shard_size=4, progress=False)
    return folder


def encode(vq: VQModel, scenes: Path, out: Path, precision: str = "float32") -> None:
    encode_cache(vq, scenes, out, precision=precision, batch_size=3, progress=False)


def test_token_ids_are_those_of_the_images(scenes: Path, tmp_path: Path) -> None:
    vq = tiny()
    encode(vq, scenes, tmp_path)
    token_ids, made_by = read_token_ids(tmp_path)
    assert made_by == fingerprint(vq)
    assert token_ids.shape == (10, 64)
    assert [len(np.load(token_ids_path(tmp_path, i))) for i in range(3)] == [4, 4, 2]
    assert np.load(token_ids_path(tmp_path, 0)).dtype == np.uint16
    pixels = CachedScenes(scenes).batch_pixels(range(10))
    with torch.no_grad():
        expected = vq.encode(to_images(pixels)).indices.flatten(1)
    assert torch.equal(token_ids.long(), expected)


def test_only_missing_shards_are_encoded(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vq = tiny()
    encode(vq, scenes, tmp_path)
    token_ids, _ = read_token_ids(tmp_path)
    token_ids_path(tmp_path, 1).unlink()
    assert len(read_token_ids(tmp_path)[0]) == 4
    counts: list[int] = []

    def counting(*arguments: object) -> object:
        result = encode_pixels(*arguments)  # type: ignore[arg-type]
        counts.append(len(result))
        return result

    monkeypatch.setattr(token_ids_module, "encode_pixels", counting)
    encode(vq, scenes, tmp_path)
    assert sum(counts) == 4
    assert torch.equal(read_token_ids(tmp_path)[0], token_ids)


def test_token_ids_of_other_tokenizers_do_not_mix(scenes: Path, tmp_path: Path) -> None:
    encode(tiny(), scenes, tmp_path)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        encode(tiny(seed=1), scenes, tmp_path)
    with pytest.raises(CheckpointError, match="another precision"):
        encode(tiny(), scenes, tmp_path, precision="bfloat16")


def test_automatic_precision_is_kept_on_resume(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vq = tiny()
    monkeypatch.setattr(token_ids_module, "quick_bfloat16", lambda device: True)
    monkeypatch.setattr(token_ids_module, "MIN_AGREEMENT", 1.01)
    encode(vq, scenes, tmp_path / "a", precision="auto")
    assert token_ids_module.read_manifest(tmp_path / "a").precision == "float32"
    monkeypatch.setattr(token_ids_module, "MIN_AGREEMENT", 0.0)
    encode(vq, scenes, tmp_path / "a", precision="auto")
    encode(vq, scenes, tmp_path / "b", precision="auto")
    assert token_ids_module.read_manifest(tmp_path / "b").precision == "bfloat16"
    monkeypatch.setattr(token_ids_module, "quick_bfloat16", lambda device: False)
    encode(vq, scenes, tmp_path / "c", precision="auto")
    assert token_ids_module.read_manifest(tmp_path / "c").precision == "float32", (
        "emulated is ten times slower"
    )


def test_agreement_is_a_share(scenes: Path) -> None:
    pixels = CachedScenes(scenes).batch_pixels(range(8))
    agreement = precision_agreement(tiny(), pixels, batch_size=3)
    same = encode_pixels(tiny(), pixels, "bfloat16") == encode_pixels(tiny(), pixels, "float32")
    assert agreement == pytest.approx(same.mean(), abs=0.02)
    assert agreement > 0.8


def test_fingerprint_sees_what_decides_the_token_ids() -> None:
    vq = tiny()
    expected = fingerprint(tiny())
    assert len(expected) == 16
    with torch.no_grad():
        vq.decoder.conv_out.bias[0] += 1e-3
        vq.post_quant_conv.bias[0] += 1e-3
    assert fingerprint(vq) == expected
    for part in (vq.encoder.conv_in.bias, vq.quant_conv.bias, vq.quantize.embedding.weight):
        with torch.no_grad():
            part.view(-1)[0] += 1e-3
        assert fingerprint(vq) != expected
        with torch.no_grad():
            part.view(-1)[0] -= 1e-3


def test_bad_input(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="precision"):
        encode(tiny(), scenes, tmp_path, precision="float8")
    with pytest.raises(InputError, match="not a cache"):
        encode(tiny(), tmp_path / "nothing", tmp_path)
    with pytest.raises(InputError, match="no token ids"):
        read_token_ids(tmp_path)
    encode(tiny(), scenes, tmp_path)
    token_ids_path(tmp_path, 0).write_bytes(b"not an array")
    with pytest.raises(CheckpointError, match="damaged"):
        read_token_ids(tmp_path)
    np.save(token_ids_path(tmp_path, 0), np.full((4, 64), 32, dtype=np.uint16))
    with pytest.raises(CheckpointError, match="does not match"):
        read_token_ids(tmp_path)


def test_command_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path / "vq")
    arguments = ["--scenes", str(scenes), "--out", str(tmp_path / "token-ids")]
    assert main(["--tokenizer", str(tmp_path / "vq"), *arguments]) == 0
    assert read_token_ids(tmp_path / "token-ids")[1] == fingerprint(tiny())
    assert main(["--tokenizer", str(tmp_path / "missing"), *arguments]) == 2
    assert "no tokenizer" in capsys.readouterr().err
