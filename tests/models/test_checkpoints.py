"""Published files: every nesting they come in loads, everything that is wrong with one is one sentence."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import GRID, VOCAB_SIZE, new_pipeline, text_encoder, transformer, vq_model
from varaccel import LlamaGenPipeline
from varaccel.errors import CheckpointError, InputError
from varaccel.models.llamagen import PRESETS, LlamaGenTransformer, feed_forward_width
from varaccel.tokenizers.text import WordTokenizer

SIZE = {"num_heads": 4, "grid_size": GRID}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return dict(transformer("c2i", seed=1).state_dict())


def same_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    loaded = model.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize("nesting", ["bare", "model", "module", "state_dict", "safetensors"])
@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_published_nestings(model_type: str, nesting: str, tmp_path: Path) -> None:
    state = dict(transformer(model_type, seed=1).state_dict())
    if nesting == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "weights.pt"
        extras = {"optimizer": {"lr": 1e-4}, "steps": 300, "args": argparse.Namespace(gpt_model="GPT-B")}
        torch.save(state if nesting == "bare" else {nesting: state, **extras}, path)
    model = LlamaGenTransformer.from_original(path, **SIZE)
    assert model.config.model_type == model_type
    assert not model.training
    assert same_weights(model, state)


def test_known_leftovers_are_dropped(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    extra = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    torch.save({"model": state | extra}, tmp_path / "a.pt")
    assert same_weights(LlamaGenTransformer.from_original(tmp_path / "a.pt", **SIZE), state)


@pytest.mark.parametrize(("resolution", "grid"), [(256, 16), (384, 24), (512, 32)])
def test_grid_from_the_file_name(
    resolution: int, grid: int, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"c2i_B_{resolution}.pt"
    torch.save(state, path)
    assert LlamaGenTransformer.from_original(path, num_heads=4).config.grid_size == grid


def damaged(kind: str, state: dict[str, torch.Tensor], path: Path) -> None:
    first = "layers.0.attention.wo.weight"
    if kind == "missing key":
        del state[first]
    elif kind == "missing layer entry":
        del state["layers.0.feed_forward.w1.weight"]
    elif kind == "missing condition":
        del state["cls_embedding.embedding_table.weight"]
    elif kind == "extra key":
        state["layers.0.attention.bias"] = torch.zeros(1)
    elif kind == "mis-shaped key":
        state[first] = state[first][:, :-1]
    elif kind == "another model":
        state = {"encoder.conv_in.weight": torch.zeros(1)}
    torch.save({"model": state}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no container":
        path.write_bytes(b"<html>not found</html>" * 50)
    elif kind == "a list":
        torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing key", r"lacks layers\.0\.attention\.wo\.weight"),
        ("missing layer entry", r"lacks layers\.0\.feed_forward\.w1\.weight"),
        ("missing condition", r"lacks both cls_embedding"),
        ("extra key", r"unexpected layers\.0\.attention\.bias"),
        ("mis-shaped key", r"layers\.0\.attention\.wo\.weight \[32, 31\] instead of \[32, 32\]"),
        ("another model", r"another kind of model"),
        ("truncated", r"truncated or not a weights file"),
        ("empty", r"truncated or not a weights file"),
        ("no container", r"is a web page, not a weights file"),
        ("a list", r"holds a list"),
    ],
)
def test_damaged_files(kind: str, message: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    damaged(kind, state, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        LlamaGenTransformer.from_original(path, **SIZE)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Payload:
    """A pickled object that would run code when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_refused(
    writer: str, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if writer == "torch":
        torch.save({"model": state, "args": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload()}))
    with pytest.raises(CheckpointError, match=r"could run code|truncated or not"):
        LlamaGenTransformer.from_original(path, **SIZE)
    assert not (tmp_path / "executed").exists()


def test_missing_facts_are_asked_for(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="pass num_heads"):
        LlamaGenTransformer.from_original(path, grid_size=GRID)
    with pytest.raises(CheckpointError, match="pass grid_size"):
        LlamaGenTransformer.from_original(path, num_heads=4)
    with pytest.raises(CheckpointError, match="no weights file"):
        LlamaGenTransformer.from_original(tmp_path / "none.pt")


@pytest.mark.parametrize("model_type", ["c2i", "t2i"])
def test_pipeline_from_single_files(model_type: str, tmp_path: Path) -> None:
    torch.save({"model": transformer(model_type).state_dict()}, tmp_path / "gpt.pt")
    components: dict[str, Any] = {}
    if model_type == "t2i":
        tokenizer = WordTokenizer.from_words(("a", "red", "sphere"), max_length=8)
        components = {"tokenizer": tokenizer, "text_encoder": text_encoder(tokenizer)}
    pipe = LlamaGenPipeline.from_single_file(tmp_path / "gpt.pt", vq_model=vq_model(), **SIZE, **components)
    pipe.set_progress_bar_config(disable=True)
    token_ids = pipe("a red sphere" if model_type == "t2i" else 3, seed=0, output_type="latent").images
    assert token_ids.shape == (1, GRID, GRID)
    assert int(token_ids.max()) < VOCAB_SIZE


@pytest.mark.parametrize(
    ("name", "millions"),
    [("B", 110.9), ("L", 342.9), ("XL", 774.7), ("XXL", 1411.0), ("3B", 3096.7)],
)
def test_published_sizes(name: str, millions: float) -> None:
    """Parameter counts of the published class-conditional models; nothing is allocated."""
    with torch.device("meta"):
        model = LlamaGenTransformer.from_preset(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == pytest.approx(millions, abs=0.1)
    assert model.layers[-1].attention.wqkv.weight.shape == (3 * model.config.dim, model.config.dim)


def test_feed_forward_widths() -> None:
    published = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704}
    assert {dim: feed_forward_width(dim, 256) for dim in published} == published


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="divisible by 4"):
        LlamaGenTransformer(dim=30, num_heads=5)
    with pytest.raises(InputError, match="multiple of num_kv_heads"):
        LlamaGenTransformer(dim=32, num_heads=4, num_kv_heads=3)
    with pytest.raises(InputError, match="model_type"):
        LlamaGenTransformer(model_type="i2i")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="LlamaGen size"):
        LlamaGenTransformer.from_preset("XS")
    assert set(PRESETS) == {"B", "L", "XL", "XXL", "3B"}


def test_grouped_query_attention_equals_repeated_heads() -> None:
    """Fewer key heads than query heads: the same as a full model whose key and value rows are repeated."""
    small = transformer("c2i", num_kv_heads=2)
    full = transformer("c2i")
    state = dict(small.state_dict())
    for key in [k for k in state if k.endswith("wqkv.weight")]:
        q, k, v = state[key].split([32, 16, 16])
        repeat = [x.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for x in (k, v)]
        state[key] = torch.cat([q, *repeat])
    full.load_state_dict(state)
    labels, tokens = torch.tensor([0, 3]), torch.arange(6).repeat(2, 1)
    torch.testing.assert_close(small(labels, tokens), full(labels, tokens))


def test_published_model_is_downloaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for the right files; what it gives is loaded. The files are made here."""
    from varaccel import AutoPipeline
    from varaccel.pipelines import published

    asked = []
    torch.save({"model": transformer("c2i", num_classes=1000).state_dict()}, tmp_path / "gpt.pt")

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file, options))
        return str(tmp_path / "gpt.pt")

    built = {}

    def single_file(path: str, **components: Any) -> LlamaGenPipeline:
        built.update(components)
        LlamaGenTransformer.from_original(path, num_heads=4, grid_size=components["grid_size"])
        return new_pipeline("c2i")

    monkeypatch.setattr(published, "hf_hub_download", download)
    monkeypatch.setattr(LlamaGenPipeline, "from_single_file", staticmethod(single_file))
    AutoPipeline.from_pretrained("llamagen-c2i-xl-384", cache_dir="there")
    assert asked == [
        ("FoundationVision/LlamaGen", "c2i_XL_384.pt", {"cache_dir": "there"}),
        ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", {"cache_dir": "there"}),
    ]
    assert built["grid_size"] == 24
    assert len(built["class_names"]) == 1000
    assert "golden retriever" in built["class_names"][207].lower()


def test_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from varaccel import AutoPipeline
    from varaccel.pipelines import published

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(published, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match="could not be downloaded from FoundationVision/LlamaGen"):
        AutoPipeline.from_pretrained("llamagen-c2i-b-256")
