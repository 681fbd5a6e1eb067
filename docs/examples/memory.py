"""The memory that published models take, counted from their sizes: no weights are loaded or downloaded.

python docs/examples/memory.py
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    T5Config,
    T5EncoderModel,
)

from varaccel import (
    BitwiseVQModel,
    InfinityTransformer,
    LlamaGenTransformer,
    MARTransformer,
    MultiScaleVQModel,
    VARTransformer,
    VQModel,
)
from varaccel.models.transformers_host.glm_image import GlmImageHost
from varaccel.nn.aspect_schedules import infinity_pixels, infinity_schedule
from varaccel.tokenizers.chameleon_vq import ChameleonImageDecoder
from varaccel.tokenizers.kl import KL16

# of google/flan-t5-xl
T5_XL = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}


def size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def weights(network: nn.Module) -> str:
    """Cells of a table: parameters, bytes in float32 and in bfloat16."""
    kept = tuple(f"{name}." for name in getattr(network, "_keep_in_fp32_modules", None) or ())
    counts = {name: p.numel() for name, p in network.named_parameters()}
    total, wide = sum(counts.values()), sum(n for name, n in counts.items() if kept and name.startswith(kept))
    return f"{total / 1e6:.0f} M | {size(4 * total)} | {size(2 * (total + wide))}"


def caches(count: int) -> str:
    """Cells: bytes of a cache whose float32 size is `count`, in float32 and in bfloat16."""
    return f"{size(count)} | {size(count / 2)}"


def llamagen() -> list[str]:
    """Rows: model, weights, cache of one guided image: two rows of prefix, tokens and a spare slot."""
    classes = [("b", 16), ("l", 16), *((name, 24) for name in ("b", "l", "xl", "xxl", "3b"))]
    models = {f"llamagen-c2i-{name}-{16 * grid}": (name, "c2i", grid) for name, grid in classes}
    models |= {f"llamagen-t2i-xl-{16 * grid}": ("xl", "t2i", grid) for grid in (16, 32)}
    rows = []
    for label, (name, kind, grid) in models.items():
        network = LlamaGenTransformer.from_preset(name.upper(), model_type=kind, grid_size=grid)
        cache = network.new_cache(2, network.prefix_length + network.num_tokens + 1)
        rows.append(f"| `{label}` | {weights(network)} | {caches(cache.nbytes)} |")
    return rows


def var() -> list[str]:
    """Rows: model, weights, cache of one guided image: all scales but the last, whose keys nobody reads."""
    rows = []
    for depth in (16, 20, 24, 30, 36):
        network = VARTransformer.from_preset(f"d{depth}")
        cache = network.new_cache(2, network.schedule.borders[-2])
        rows.append(f"| `var-d{depth}` | {weights(network)} | {caches(cache.nbytes)} |")
    return rows


def infinity() -> list[str]:
    """Rows: model, weights; then the cache of one guided square image: all scales but the last."""
    rows = []
    for name in ("2B", "8B"):
        network = InfinityTransformer.from_preset(name)
        rows.append(f"| `infinity-{name.lower()}` | {weights(network)} |")
        for scales in ("0.06M", "0.25M", "1M"):
            schedule = infinity_schedule("1.0", scales)
            tokens = schedule.num_tokens
            cache, side = network.new_cache(2, schedule.borders[-2]), infinity_pixels("1.0", scales)[0]
            rows.append(
                f"| `infinity-{name.lower()}` | {side} × {side} | {tokens} | {caches(cache.nbytes)} |"
            )
    return rows


def mar() -> list[str]:
    """Rows: model, weights, and the caches of `feature_cache` for one guided image; plain decoding has none."""
    rows = []
    for name in ("base", "large", "huge"):
        network = MARTransformer.from_preset(name)
        cache = sum(cache.nbytes for cache in network.new_caches(2))
        rows.append(f"| `mar-{name}` | {weights(network)} | {caches(cache)} |")
    return rows


def glm_image() -> list[str]:
    """Rows: the model's weights; then size, tokens and cache of an image whose prompt has 100 tokens."""
    model = GlmImageForConditionalGeneration(GlmImageConfig())
    host = GlmImageHost(model)
    rows = [f"| GLM-Image, autoregressive model | {weights(model)} |"]
    for side in (512, 1024, 2048):
        tokens = 16**2 + (side // 32) ** 2
        cache = host.new_cache(1, 100 + tokens + 1)
        count = cache.nbytes * 4 // host.dtype.itemsize
        rows.append(f"| {side} × {side} | 256 + {tokens - 256} | {caches(count)} |")
    return rows


def janus() -> list[str]:
    """Rows: model, images, cache of guided images whose prompts have 50 tokens; no head shares its keys."""
    layers_and_widths = {"Janus-Pro-1B": (24, 2048), "Janus-Pro-7B": (30, 4096)}
    return [
        f"| {name} | {images} | {caches(4 * 2 * layers * width * 2 * images * (50 + 24**2))} |"
        for name, (layers, width) in layers_and_widths.items()
        for images in (1, 8)
    ]


def emu3() -> list[str]:
    """Rows: the weights; then size, tokens and cache of a row whose prompt has 100 tokens."""
    model = Emu3ForConditionalGeneration(Emu3Config(vocabulary_map={"<image>": 0}))
    rows = [f"| Emu3, with its image tokenizer | {weights(model)} |"]
    attention = model.config.text_config
    width = attention.hidden_size // attention.num_attention_heads
    for height, across in ((512, 512), (720, 720)):
        tokens = height // 8 * (across // 8 + 1)
        count = 2 * attention.num_hidden_layers * attention.num_key_value_heads * width * (100 + tokens)
        rows.append(f"| {height} × {across} | {tokens} | {caches(count * 4)} |")
    return rows


def chameleon() -> list[str]:
    """Rows: the weights; then the cache of a row whose prompt has 100 tokens."""
    model = ChameleonForConditionalGeneration(ChameleonConfig(vocabulary_map={"<image>": 0}))
    count = 2 * model.config.num_hidden_layers * model.config.hidden_size * (100 + 1024)
    return [
        f"| Chameleon, 7B | {weights(model)} |",
        f"| its image decoder | {weights(ChameleonImageDecoder())} |",
        f"| 512 × 512 | 1024 | {caches(count * 4)} |",
    ]


def imagegpt() -> list[str]:
    """Rows: size, weights of each; then the cache of an image."""
    sizes = {"small": (512, 24, 8), "medium": (1024, 36, 8), "large": (1536, 48, 16)}
    rows = []
    for name, (width, layers, heads) in sizes.items():
        config = ImageGPTConfig(n_embd=width, n_layer=layers, n_head=heads)
        rows.append(f"| ImageGPT {name} | {weights(ImageGPTForCausalImageModeling(config))} |")
        rows.append(f"| {name} | 1024 | {caches(2 * layers * width * 1024 * 4)} |")
    return rows


def others() -> list[str]:
    """Rows: image tokenizers and the text encoder, and their weights."""
    networks = {
        "LlamaGen's image tokenizer": VQModel.from_preset("VQ-16"),
        "VAR's image tokenizer": MultiScaleVQModel(),
        "Infinity's image tokenizer, 32 bits": BitwiseVQModel(),
        "MAR's image tokenizer": AutoencoderKL(**KL16),
        "Flan-T5-XL, encoder": T5EncoderModel(T5Config(**T5_XL)),
    }
    return [f"| {name} | {weights(network)} |" for name, network in networks.items()]


if __name__ == "__main__":
    with torch.device("meta"):
        for table in (llamagen, var, infinity, mar, janus, glm_image, emu3, chameleon, imagegpt, others):
            print("\n".join(table()), end="\n\n")
