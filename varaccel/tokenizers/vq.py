"""VQ image tokenizers as LlamaGen uses them: images to a grid of codebook indices and back.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", section 2.1;
the l2-normalised low-dimensional codebook is Yu et al., "Vector-quantized Image Modeling with Improved
VQGAN" (ViT-VQGAN), section 3.2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varaccel.errors import InputError, unknown_name
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.tokenizers.blocks import Decoder, Encoder

# Sites compared with the codebook at once; bounds the score matrix to 256 MB for 16384 codebook entries.
QUANTIZE_CHUNK = 4096


@dataclass(frozen=True)
class VQEncoding:
    """What `VQModel.encode` returns.

    Attributes:
        latents: [B, D, h, w] float, encoder output before quantisation, not normalised.
        quantized: [B, D, h, w] float, the chosen codebook rows, each of norm 1.
        indices: [B, h, w] int64, in [0, codebook_size).
    """

    latents: Tensor
    quantized: Tensor
    indices: Tensor


@dataclass(frozen=True)
class VQTrainingOutput:
    """What `VQModel.forward` returns: the ingredients of the training losses.

    Attributes:
        reconstruction: [B, C, H, W], decoded from the straight-through quantised latents.
        latents: float32, what the encoder said, with gradient to it; [B*h*w, D], l2-normalised.
        quantized: float32 of the same shape, what stands for it, with gradient to the codebook.
        indices: [B, h, w] int64, or [B, L] of a multi-scale model.
        similarity: [B*h*w, K] float32, cosines of latents and codebook rows, with gradient to both; None where
            the codebook is not searched by angle.
        sites: [N, D] float32, what was compared with the codebook, one row per index.
        rows: [N, D] float32, the codebook rows that were chosen for them.
    """

    reconstruction: Tensor
    latents: Tensor
    quantized: Tensor
    indices: Tensor
    similarity: Tensor | None
    sites: Tensor
    rows: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantisation on the unit sphere.

    Codebook rows are stored raw and normalised where they are used. On the sphere the nearest row by
    Euclidean distance is the one of largest cosine; the first index wins ties.
    """

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def codebook(self) -> Tensor:
        """The normalised codebook, [K, D] float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def forward(self, sites: Tensor) -> Tensor:
        """Indices [N] int64 of the rows nearest to normalised float32 `sites` [N, D]."""
        codebook = self.codebook()
        return torch.cat([(part @ codebook.T).argmax(dim=-1) for part in sites.split(QUANTIZE_CHUNK)])


def check_images(images: Tensor, channels: int) -> None:
    """Raise InputError unless `images` are [B, channels, H, W]."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise InputError(f"images must have shape [B, {channels}, H, W], got {list(images.shape)}.")


def check_latents(latents: Tensor, dim: int) -> None:
    """Raise InputError unless `latents` are [B, dim, h, w]."""
    if latents.ndim != 4 or latents.shape[1] != dim:
        raise InputError(f"decode takes [B, {dim}, h, w] latents, got {list(latents.shape)}.")


def check_integers(token_ids: Tensor) -> None:
    """Raise InputError unless `token_ids` are integers of some type."""
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got {token_ids.dtype}.")


def check_range(token_ids: Tensor, codebook_size: int, least: int = 0) -> None:
    """Raise InputError unless all `token_ids` lie in the codebook, or are `least` at least. Waits for the device."""
    if token_ids.numel() and not least <= int(token_ids.min()) <= int(token_ids.max()) < codebook_size:
        raise InputError(f"token ids must lie in [{least}, {codebook_size}).")


class VQModel(ModelMixin, ConfigMixin):
    """Convolutional encoder, l2-normalised vector quantiser, convolutional decoder.

    Images are RGB in [-1, 1]; decoded images are not clamped. Quantisation always happens in float32,
    whatever the dtype of the convolutions or an autocast region around the call.

    Args:
        in_channels: image channels.
        base_channels: width of the full-resolution level.
        channel_multipliers: width of each level in units of `base_channels`, full resolution first; every
            level but the last halves height and width.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        z_channels: width between the convolutional parts and the 1x1 projections to `codebook_dim`.
        codebook_size: number K of codebook entries.
        codebook_dim: dimension D of a code vector.
        norm_groups: groups of every GroupNorm (32 in the published models).
        dropout: dropout inside residual blocks, active in training only.

    Raises:
        InputError: widths that `norm_groups` does not divide, or non-positive sizes.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (base_channels, *channel_multipliers, num_res_blocks, z_channels, codebook_size, codebook_dim)
        if not channel_multipliers or min(sizes) < 1:
            raise InputError(
                "every size of a VQModel must be at least 1 and there must be at least one level."
            )
        if any(base_channels * m % norm_groups for m in (1, *channel_multipliers)):
            raise InputError(f"norm_groups={norm_groups} must divide base_channels times every multiplier.")
        shape = (base_channels, tuple(channel_multipliers), num_res_blocks, z_channels, norm_groups, dropout)
        self.encoder = Encoder(in_channels, *shape)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.decoder = Decoder(in_channels, *shape)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> VQModel:
        """A randomly initialised model of a published layout: "VQ-8" or "VQ-16".

        Raises:
            InputError: no such preset.
        """
        if name not in PRESETS:
            raise unknown_name("VQ preset", name, PRESETS)
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_original(
        cls, path: str | os.PathLike[str], variant: str = "VQ-16", *, ema: bool = False, **overrides: Any
    ) -> VQModel:
        """Load a published file: `vq_ds16_c2i.pt` and `vq_ds16_t2i.pt` are "VQ-16", `vq_ds8_c2i.pt` "VQ-8".

        Args:
            path: the `.pt` or `.safetensors` file.
            variant: name of the layout.
            ema: take the averaged weights if the file has them, as LlamaGen's reconstruction tools do; its
                samplers never do, so that is the default.
            overrides: config entries that differ from the layout's.

        Raises:
            InputError: no such variant.
            CheckpointError: the file cannot be read or does not fit the variant.
        """
        model = cls.from_preset(variant, **overrides)
        state = read_published_weights(path, anchor_key="quantize.embedding.weight", averaged=ema)
        # a usage statistic of the training code
        load_strict(model, state, source=str(path), drop=(r"quantize\.codebook_used",))
        return model.eval()

    @property
    def codebook(self) -> Tensor:
        """The vectors of the token ids as they are stored, [K, D]; `quantize` normalises them."""
        return self.quantize.embedding.weight

    @property
    def downsample_factor(self) -> int:
        """Image pixels per token along each side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the token grid of an image of `image_size` pixels (side, or height and width).

        Raises:
            InputError: a side is not a positive multiple of `downsample_factor`.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        f = self.downsample_factor
        if height < 1 or width < 1 or height % f or width % f:
            raise InputError(f"image sides must be positive multiples of {f}, got {height}x{width}.")
        return height // f, width // f

    def encode(self, images: Tensor) -> VQEncoding:
        """Tokenize `images` [B, C, H, W] in [-1, 1].

        Raises:
            InputError: wrong rank or channel count, or sides that `downsample_factor` does not divide.
        """
        latents = self._latents(images)  # [B, D, h, w]
        with torch.autocast(latents.device.type, enabled=False):
            sites = self._sites(latents)  # [B*h*w, D]
            indices = self.quantize(sites)  # [B*h*w]
            batch, _, h, w = latents.shape
            indices = indices.view(batch, h, w)
            return VQEncoding(latents, self.lookup(indices).to(latents.dtype), indices)

    def encode_tokens(self, images: Tensor) -> Tensor:
        """The token ids [B, h, w] that `decode_tokens` takes, of `images`; see `encode`."""
        return self.encode(images).indices

    def lookup(self, indices: Tensor) -> Tensor:
        """Normalised codebook rows of `indices` [B, h, w]: [B, D, h, w] in the codebook's dtype."""
        rows = F.embedding(indices, self.quantize.codebook())  # [B, h, w, D]
        return rows.permute(0, 3, 1, 2).to(self.quantize.embedding.weight.dtype)

    def decode(self, quantized: Tensor) -> Tensor:
        """Images [B, C, H, W], not clamped, from codebook rows `quantized` [B, D, h, w].

        Raises:
            InputError: not of shape [B, D, h, w].
        """
        check_latents(quantized, self.config.codebook_dim)
        return self.decoder(self.post_quant_conv(quantized))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Images [B, C, H, W], not clamped, from `token_ids` [B, h, w], or [B, N] in raster order of a square.

        Raises:
            InputError: not integers, outside [0, codebook_size), or N is not a square number.
        """
        check_integers(token_ids)
        if token_ids.ndim == 2:
            side = math.isqrt(token_ids.shape[1])
            if side * side != token_ids.shape[1]:
                raise InputError(
                    f"{token_ids.shape[1]} tokens in a row are no square grid; give them as [B, rows, columns]."
                )
            token_ids = token_ids.view(-1, side, side)
        if token_ids.ndim != 3:
            raise InputError(f"token ids must have shape [B, h, w] or [B, N], got {list(token_ids.shape)}.")
        check_range(token_ids, self.codebook_size)
        return self.decode(self.lookup(token_ids.long()))

    def forward(self, images: Tensor) -> VQTrainingOutput:
        """One training pass over `images` [B, C, H, W]; gradients skip the quantiser (straight-through)."""
        latents = self._latents(images)
        with torch.autocast(latents.device.type, enabled=False):
            sites = self._sites(latents)
            codebook = self.quantize.codebook()
            similarity = sites @ codebook.T  # [B*h*w, K]
            chosen = similarity.detach().argmax(dim=-1)
            rows = F.embedding(chosen, codebook)  # [B*h*w, D]
            batch, dim, h, w = latents.shape
            passed = (sites + (rows - sites).detach()).view(batch, h, w, dim).permute(0, 3, 1, 2)
        return VQTrainingOutput(
            self.decode(passed),
            sites,
            rows,
            chosen.view(batch, h, w),
            similarity,
            sites.detach(),
            rows.detach(),
        )

    def _latents(self, images: Tensor) -> Tensor:
        check_images(images, self.config.in_channels)
        self.grid((images.shape[2], images.shape[3]))
        return self.quant_conv(self.encoder(images))

    @staticmethod
    def _sites(latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] as normalised float32 rows [B*h*w, D] in (batch, row, column) order."""
        return F.normalize(latents.float().permute(0, 2, 3, 1).flatten(0, 2), dim=-1)


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "VQ-8": MappingProxyType({"channel_multipliers": (1, 2, 2, 4)}),
        "VQ-16": MappingProxyType({"channel_multipliers": (1, 1, 2, 2, 4)}),
    }
)
