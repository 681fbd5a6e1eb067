"""Rendered scenes as datasets: on demand and on disk, with interrupted and resumed writes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from varaccel.errors import InputError
from varaccel.scenes import HELD_OUT_SEED, WORLD_VERSION
from varaccel.scenes import cache as cache_module
from varaccel.scenes.cache import CachedScenes, main, read_manifest, write_cache
from varaccel.scenes.dataset import ScenesDataset, make_sample


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_items_are_normalised_images_with_their_captions() -> None:
    dataset = ScenesDataset(100, 4, size=32)
    item = dataset[2]
    sample = make_sample(102, 32)
    assert len(dataset) == 4
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.float32
    restored = ((item["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(restored, sample.rendering.image)
    assert item["caption"] == sample.caption.text
    assert item["seed"] == 102
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize(("first_seed", "length", "size"), [(-1, 4, 32), (0, 0, 32), (0, 4, 8)])
def test_impossible_datasets_are_refused(first_seed: int, length: int, size: int) -> None:
    with pytest.raises(InputError):
        ScenesDataset(first_seed, length, size)


def test_a_cache_returns_what_the_dataset_renders(tmp_path: Path) -> None:
    write_cache(tmp_path, 7, 11, size=32, shard_size=4, progress=False)
    cached, rendered = CachedScenes(tmp_path), ScenesDataset(7, 11, size=32)
    assert len(cached) == 11
    assert cached.size == 32
    for index in range(11):
        expected, item = rendered[index], cached[index]
        assert torch.equal(item["image"], expected["image"])
        assert (item["caption"], item["seed"]) == (expected["caption"], expected["seed"])
        truth = cached.ground_truth(index)
        assert (truth["seed"], truth["caption"]) == (expected["seed"], expected["caption"])
        assert len(truth["boxes"]) == len(truth["objects"])
    assert cached.captions == [rendered[index]["caption"] for index in range(11)]
    batch = cached.batch_pixels([9, 0, 4])
    np.testing.assert_array_equal(batch[0], cached.pixels(9))
    assert batch.dtype == np.uint8
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            cached[outside]


def test_a_cache_travels_to_data_loader_workers_without_its_images(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, 6, size=64, shard_size=3, progress=False)
    cached = CachedScenes(tmp_path)
    images = np.stack([cached.pixels(index) for index in range(6)])
    assert len(pickle.dumps(cached)) < images.nbytes / 10
    batches = list(DataLoader(cached, batch_size=3, num_workers=1))
    assert [batch["seed"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert batches[0]["image"].shape == (3, 3, 64, 64)


def test_an_interrupted_write_is_resumed_without_repeating_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_cache(whole, 0, 10, size=16, shard_size=4, progress=False)
    render_chunk = cache_module._render_chunk
    rendered: list[int] = []

    def failing(task: tuple[int, int, int]) -> object:
        if task[0] >= 4:
            raise KeyboardInterrupt
        return render_chunk(task)

    monkeypatch.setattr(cache_module, "_render_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        write_cache(broken, 0, 10, size=16, shard_size=4, progress=False)
    assert sorted(_contents(broken)) == ["captions-00000.jsonl", "images-00000.npy", "manifest.json"]
    with pytest.raises(InputError, match="1 of 3 shards finished"):
        CachedScenes(broken)
    assert len(CachedScenes(broken, allow_partial=True)) == 4

    def counting(task: tuple[int, int, int]) -> object:
        rendered.extend(range(task[0], task[0] + task[1]))
        return render_chunk(task)

    monkeypatch.setattr(cache_module, "_render_chunk", counting)
    write_cache(broken, 0, 10, size=16, shard_size=4, progress=False)
    assert rendered == list(range(4, 10))
    assert _contents(broken) == _contents(whole)


def test_captions_without_their_images_do_not_count_as_a_shard(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, 6, size=16, shard_size=3, progress=False)
    before = _contents(tmp_path)
    (tmp_path / "images-00001.npy").unlink()
    with pytest.raises(InputError, match="1 of 2 shards"):
        CachedScenes(tmp_path)
    write_cache(tmp_path, 0, 6, size=16, shard_size=3, progress=False)
    assert _contents(tmp_path) == before


@pytest.mark.slow
def test_a_killed_writer_leaves_only_whole_shards_and_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    arguments = ["--out", str(folder), "--count", "4000", "--size", "16", "--shard-size", "40"]
    writer = subprocess.Popen(
        [sys.executable, "-m", "varaccel.scenes.cache", *arguments],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "images-00002.npy").exists():
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    partial = CachedScenes(folder, allow_partial=True)
    assert 120 <= len(partial) < 4000
    assert len(partial) % 40 == 0
    for index in (0, len(partial) - 1):
        np.testing.assert_array_equal(partial.pixels(index), make_sample(index, 16).rendering.image)
    # what the kill left unfinished is written by the next run; shorten it to two more shards
    finished = len(partial) // 40
    for shard in range(finished + 2, 100):
        np.save(folder / f"images-{shard:05d}.npy", np.zeros((40, 16, 16, 3), np.uint8))
        record = json.dumps({"caption": "filler"})
        (folder / f"captions-{shard:05d}.jsonl").write_text((record + "\n") * 40)
    assert main(arguments) == 0
    complete = CachedScenes(folder)
    assert len(complete) == 4000
    for index in (finished * 40, finished * 40 + 79):
        sample = make_sample(index, 16)
        np.testing.assert_array_equal(complete.pixels(index), sample.rendering.image)
        assert complete.captions[index] == sample.caption.text


@pytest.mark.slow
def test_several_workers_write_the_same_cache(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_cache(one, 3, 120, size=16, shard_size=120, progress=False)
    write_cache(two, 3, 120, size=16, shard_size=120, workers=2, progress=False)
    assert _contents(one) == _contents(two)


@pytest.mark.parametrize("change", [{"first_seed": 1}, {"size": 32}, {"shard_size": 2}, {"count": 2}])
def test_caches_of_different_settings_are_not_mixed(tmp_path: Path, change: dict[str, int]) -> None:
    settings = {"first_seed": 0, "count": 4, "size": 16, "shard_size": 4}
    write_cache(tmp_path, **settings, progress=False)
    before = _contents(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        write_cache(tmp_path, **{**settings, **change}, progress=False)
    assert _contents(tmp_path) == before


def test_a_cache_of_whole_shards_can_grow(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, 4, size=16, shard_size=4, progress=False)
    write_cache(tmp_path, 0, 6, size=16, shard_size=4, progress=False)
    assert len(CachedScenes(tmp_path)) == 6
    with pytest.raises(InputError, match="other settings"):
        write_cache(tmp_path, 0, 9, size=16, shard_size=4, progress=False)


def test_another_version_of_the_world_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path, 0, 2, size=16, progress=False)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["version"] == WORLD_VERSION == read_manifest(tmp_path).version
    path.write_text(json.dumps({**manifest, "version": "scenes-0"}))
    for action in (
        lambda: CachedScenes(tmp_path),
        lambda: write_cache(tmp_path, 0, 2, size=16, progress=False),
    ):
        with pytest.raises(InputError, match="scenes-0"):
            action()


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "scenes-1"}'])
def test_a_damaged_manifest_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="cannot be read"):
        CachedScenes(tmp_path)


def test_a_folder_without_manifest_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a cache"):
        CachedScenes(tmp_path)


@pytest.mark.parametrize(
    ("first_seed", "count", "size", "workers"),
    [(-1, 4, 16, 1), (0, 0, 16, 1), (0, 4, 8, 1), (0, 4, 16, 0), (HELD_OUT_SEED - 2, 4, 16, 1)],
)
def test_impossible_caches_are_refused_before_anything_is_written(
    tmp_path: Path, first_seed: int, count: int, size: int, workers: int
) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(InputError):
        write_cache(folder, first_seed, count, size, workers, progress=False)
    assert not folder.exists()


def test_held_out_seeds_have_caches_of_their_own(tmp_path: Path) -> None:
    write_cache(tmp_path, HELD_OUT_SEED, 3, size=16, progress=False)
    assert [CachedScenes(tmp_path)[index]["seed"] for index in range(3)] == [
        HELD_OUT_SEED + index for index in range(3)
    ]


def test_the_command_reports_bad_input_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "x"), "--count", "0"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
