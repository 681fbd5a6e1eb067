"""KL-regularised image tokenizers: images to a grid of continuous latents and back.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), section
3.1, in the layout that MAR (arXiv 2406.11838) publishes as `kl16.ckpt`. The network is diffusers' `AutoencoderKL`; here
are its sizes, the way from published names to diffusers', and latents as tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from varaccel.errors import CheckpointError, InputError
from varaccel.nn.checkpoints import load_strict, read_published_weights

MAR_SCALING_FACTOR = 0.2325
"""What latents of `kl16.ckpt` are multiplied by to have about unit variance (published MAR code)."""


def patchify(latents: Tensor, patch: int = 1) -> Tensor:
    """Latents [B, c, H, W] as tokens [B, (H / p)(W / p), c p p] in raster order.

    The numbers of a token are ordered by channel, then row in the patch, then column in the patch (published MAR code).

    Raises:
        InputError: not of rank 4, or sides that are no multiples of the patch.
    """
    if latents.ndim != 4 or patch < 1 or latents.shape[-2] % patch or latents.shape[-1] % patch:
        raise InputError(f"latents {list(latents.shape)} cannot be cut into patches of side {patch}.")
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, height: int) -> Tensor:
    """The inverse of `patchify`: tokens [B, N, c p p] as latents [B, c, H, W].

    Args:
        height: H.

    Raises:
        InputError: not of rank 3, or tokens that do not fill whole patches of latents of that height.
    """
    rows = height // patch if patch > 0 and height % patch == 0 else 0
    if tokens.ndim != 3 or rows < 1 or tokens.shape[1] % rows or tokens.shape[2] % (patch * patch):
        raise InputError(
            f"tokens {list(tokens.shape)} are no latents of height {height} cut into patches of side {patch}."
        )
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", p=patch, q=patch, h=rows)


def kl_config(
    block_out_channels: tuple[int, ...],
    latent_channels: int,
    *,
    layers_per_block: int = 2,
    attention_levels: int = 1,
    norm_num_groups: int = 32,
    sample_size: int = 256,
    scaling_factor: float = MAR_SCALING_FACTOR,
) -> dict[str, Any]:
    """Arguments of `AutoencoderKL` for the published layout.

    Args:
        block_out_channels: widths of the levels, full resolution first; all but the last halve the sides.
        attention_levels: how many of the lowest levels of the encoder have attention; levels of the decoder have none.
    """
    levels = len(block_out_channels)
    plain = levels - attention_levels
    return {
        "down_block_types": ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attention_levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": block_out_channels,
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": norm_num_groups,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


KL16: Mapping[str, Any] = MappingProxyType(kl_config((128, 128, 256, 256, 512), 16))
"""Arguments of `AutoencoderKL` for `kl16.ckpt`: 16 pixels per latent along each side, 66.5 million parameters."""


def load_kl(path: str | os.PathLike[str], **changes: Any) -> AutoencoderKL:
    """Load a published tokenizer, `kl16.ckpt`. Sizes are read off the tensors.

    Args:
        path: the file; weights bare or under "model".
        changes: config entries that the tensors do not tell, such as `scaling_factor` or `sample_size`.

    Returns:
        the model in float32 and eval mode: images [B, 3, H, W] in [-1, 1] to latents [B, c, H / f, W / f] that are
        not scaled, and back.

    Raises:
        CheckpointError: the file cannot be read or does not fit the layout.
    """
    state = read_published_weights(path, anchor_key="quant_conv.weight")
    config = {**_published_config(state, source=str(path)), **changes}
    model = AutoencoderKL(**config)
    levels = len(config["block_out_channels"])
    load_strict(model, {_renamed(k, levels): _reshaped(k, v) for k, v in state.items()}, source=str(path))
    return model.eval()


def _published_config(state: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    try:
        levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
        widths = tuple(
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        )
        blocks = sum(
            bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)) for name in state
        )
        attention = [f"encoder.down.{level}.attn.0.norm.weight" in state for level in range(levels)]
        latents = state["post_quant_conv.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} holds no KL tokenizer of the published layout ({error}); choose kl16.ckpt."
        ) from error
    down = ("AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attention)
    return {**kl_config(widths, latents, layers_per_block=blocks), "down_block_types": tuple(down)}


_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}


def _renamed(key: str, levels: int) -> str:
    """The name in diffusers' layout."""
    key = re.sub(r"\.nin_shortcut\.", ".conv_shortcut.", key)
    key = re.sub(r"\.norm_out\.", ".conv_norm_out.", key)
    if match := re.match(r"(.*\.)attn(?:_1)?((?:\.\d+)?)\.(q|k|v|proj_out|norm)\.(.*)", key):
        front, index, part, end = match.groups()
        # the middle has one attention, levels have one per block
        key = f"{front}attentions{index or '.0'}.{_ATTENTION[part]}.{end}"
    key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
    key = key.replace(".mid.", ".mid_block.")
    key = re.sub(r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets.", key)
    key = re.sub(r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0.", key)
    key = re.sub(r"\.down\.(\d+)\.attentions", r".down_blocks.\1.attentions", key)

    def up(match: re.Match[str]) -> str:
        what = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
        return f".up_blocks.{levels - 1 - int(match[1])}.{what}."  # published decoders count from full resolution

    return re.sub(r"\.up\.(\d+)\.(block|upsample)\.", up, key)


def _reshaped(key: str, value: Tensor) -> Tensor:
    """Attention of the published layout is made of 1x1 convolutions, diffusers' of matrices."""
    if re.search(r"attn(_1)?(\.\d+)?\.(q|k|v|proj_out)\.weight", key):
        return value.flatten(1)
    return value
