"""Multi-scale residual VQ image tokenizer of VAR: images to token maps of growing size and back.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (VAR,
arXiv 2404.02905), section 3.2, algorithms 1 and 2; layout of the published `vae_ch160v4096z32.pth`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from varaccel.errors import CheckpointError, InputError
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.scale_schedule import SCALES_256, ScaleSchedule, shared_convolution_table
from varaccel.tokenizers.blocks import Decoder, Encoder
from varaccel.tokenizers.level_layout import block_name, count, network_sizes
from varaccel.tokenizers.vq import (
    QUANTIZE_CHUNK,
    VQTrainingOutput,
    check_images,
    check_integers,
    check_latents,
    check_range,
)


@dataclass(frozen=True)
class MultiScaleEncoding:
    """What `MultiScaleVQModel.encode` returns.

    Attributes:
        latents: [B, D, n, n] float, encoder output before quantisation.
        quantized: [B, D, n, n] float32, the feature map that all scales add up to; what `decode` takes.
        indices: [B, L] int64, in [0, codebook_size), scale after scale.
    """

    latents: Tensor
    quantized: Tensor
    indices: Tensor


class Phi(nn.Conv2d):
    """What follows the up-sampling of a scale: x -> (1 - r) x + r conv(x), [B, D, n, n] float32 -> same."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__(dim, dim, 3, padding=1)
        self.ratio = ratio
        nn.init.dirac_(self.weight)  # training starts from the identity

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        # also with half-precision weights the sum over scales is one of float32 numbers
        y = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
        return x * (1 - self.ratio) + y * self.ratio


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation over the scales of a schedule, and the feature map that the scales add up to.

    Everything here runs in float32, whatever an autocast region around it says.

    Args:
        codebook_size: number V of codebook entries.
        codebook_dim: width D of a code vector.
        schedule: the scales.
        shared_convolutions: how many convolutions the scales share.
        convolution_ratio: r of `Phi`.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        schedule: ScaleSchedule,
        shared_convolutions: int,
        convolution_ratio: float,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        self.phi = nn.ModuleList(Phi(codebook_dim, convolution_ratio) for _ in range(shared_convolutions))
        self.table = shared_convolution_table(schedule, shared_convolutions)

    def nearest(self, sites: Tensor) -> Tensor:
        """Indices [N] int64 of the codebook entries nearest to float32 `sites` [N, D] by Euclidean distance."""
        codebook = self.embedding.weight.float()
        norms = codebook.square().sum(1)
        return torch.cat(
            [
                (part.square().sum(1, keepdim=True) + norms - 2 * part @ codebook.T).argmin(1)
                for part in sites.split(QUANTIZE_CHUNK)
            ]
        )

    def start(self, batch: int) -> Tensor:
        """The feature map before the first scale: zeros [B, D, n, n] float32."""
        side = self.schedule.last_side
        weight = self.embedding.weight
        return torch.zeros(batch, weight.shape[1], side, side, dtype=torch.float32, device=weight.device)

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [B, p*p] of a scale as float32 vectors [B, p*p, D]; zeros for -1, which is no token."""
        vectors = F.embedding(indices.clamp(min=0), self.embedding.weight).float()
        return torch.where(indices.unsqueeze(-1) < 0, 0.0, vectors)

    def spread(self, vectors: Tensor, scale: int) -> Tensor:
        """What a scale's vectors [B, p*p, D] add to the feature map: [B, D, n, n] float32."""
        side, last = self.schedule.sides[scale], self.schedule.last_side
        with torch.autocast(vectors.device.type, enabled=False):
            x = vectors.float().mT.unflatten(2, (side, side))  # [B, D, p, p]
            if scale < len(self.schedule) - 1:
                x = F.interpolate(x, size=(last, last), mode="bicubic")
            return self.phi[self.table[scale]](x)

    def look(self, feature_map: Tensor, scale: int) -> Tensor:
        """What a scale sees of the scales before it: the feature map's average over its cells, [B, p*p, D]."""
        side = self.schedule.sides[scale]
        x = feature_map if side == feature_map.shape[-1] else F.adaptive_avg_pool2d(feature_map, side)
        return x.flatten(2).mT

    def encode(self, latents: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Greedy residual quantisation of float32 `latents` [B, D, n, n].

        Returns:
            indices [B, L] int64, the residuals that were quantised [B, L, D], and the feature map after every
            scale, S tensors [B, D, n, n]; gradients flow to the codebook and the convolutions only.
        """
        rest = latents.detach()
        feature_map = torch.zeros_like(rest)
        indices, sites, maps = [], [], []
        for scale in range(len(self.schedule)):
            seen = self.look(rest, scale)  # [B, p*p, D]
            chosen = self.nearest(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
            part = self.spread(self.lookup(chosen), scale)
            feature_map = feature_map + part
            rest = rest - part.detach()
            indices.append(chosen)
            sites.append(seen)
            maps.append(feature_map)
        return torch.cat(indices, 1), torch.cat(sites, 1), maps

    @torch.no_grad()
    def pyramid(self, latents: Tensor) -> Tensor:
        """What each scale would have to say of `latents` [B, D, n, n] if code vectors were exact: [B, L, D]."""
        rest, sites = latents.float(), []
        for scale in range(len(self.schedule)):
            sites.append(self.look(rest, scale))
            rest = rest - self.spread(sites[-1], scale)
        return torch.cat(sites, 1)

    def feature_maps(self, indices: Tensor, scales: int | None = None) -> list[Tensor]:
        """The feature map after each of the first `scales` scales (all if None), [B, D, n, n] float32 each.

        Args:
            indices: [B, L], or without the scales that are left out; -1 where there is no token.
        """
        maps, current = [], self.start(len(indices))
        for scale in range(len(self.schedule) if scales is None else scales):
            chosen = indices[:, self.schedule.span(scale)]
            current = current + self.spread(self.lookup(chosen), scale) * has_tokens(chosen)
            maps.append(current)
        return maps

    def inputs(self, indices: Tensor) -> Tensor:
        """What a next-scale model is fed in training: for scales 1 to S - 1 what they see, [B, L - 1, D] float32.

        Args:
            indices: [B, L] or without the last scale.
        """
        maps = self.feature_maps(indices, len(self.schedule) - 1)
        if not maps:
            return self.start(len(indices)).flatten(2).mT[:, :0]
        return torch.cat([self.look(current, scale) for scale, current in enumerate(maps, start=1)], 1)


def has_tokens(token_ids: Tensor) -> Tensor:
    """Whether images have a token among those [B, P] of a scale, which adds nothing else: [B, 1, 1, 1] bool."""
    return (token_ids >= 0).any(1).view(-1, 1, 1, 1)


class MultiScaleVQModel(ModelMixin, ConfigMixin):
    """Convolutional encoder, multi-scale residual quantiser, convolutional decoder.

    Images are RGB in [-1, 1]; decoded images are not clamped. The networks are those of `VQModel`.

    Args:
        in_channels: image channels.
        base_channels: width of the full-resolution level.
        channel_multipliers: width of each level in units of `base_channels`, full resolution first; every
            level but the last halves height and width.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        codebook_size: number V of codebook entries.
        codebook_dim: width D of a code vector and of the feature map.
        scales: sides of the token maps, coarse to fine; the last one is the side of the feature map.
        norm_groups: groups of every GroupNorm (32 in the published model).
        shared_convolutions: convolutions shared by the scales (4 in the published model).
        convolution_ratio: weight of the convolution beside the identity.
        dropout: dropout inside residual blocks, active in training only.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scales: Sequence[int] = SCALES_256,
        norm_groups: int = 32,
        shared_convolutions: int = 4,
        convolution_ratio: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (base_channels, *channel_multipliers, num_res_blocks, codebook_size, codebook_dim)
        if not channel_multipliers or min(*sizes, shared_convolutions, norm_groups) < 1:
            raise InputError(
                "every size of a MultiScaleVQModel must be at least 1 and there must be at least one level."
            )
        if any(base_channels * m % norm_groups for m in (1, *channel_multipliers)):
            raise InputError(f"norm_groups={norm_groups} must divide base_channels times every multiplier.")
        shape = (
            base_channels,
            tuple(channel_multipliers),
            num_res_blocks,
            codebook_dim,
            norm_groups,
            dropout,
        )
        self.encoder = Encoder(in_channels, *shape)
        self.quant_conv = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.quantize = MultiScaleQuantizer(
            codebook_size, codebook_dim, ScaleSchedule(tuple(scales)), shared_convolutions, convolution_ratio
        )
        self.post_quant_conv = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.decoder = Decoder(in_channels, *shape)

    @classmethod
    def from_original(
        cls, path: str | os.PathLike[str], *, scales: Sequence[int] = SCALES_256, norm_groups: int = 32
    ) -> MultiScaleVQModel:
        """Load a published file, `vae_ch160v4096z32.pth`, or one of another size in its layout.

        Args:
            path: the `.pth` or `.safetensors` file.
            scales: the schedule; it is not in the file, which serves 256- and 512-pixel models alike.
            norm_groups: groups of every GroupNorm, not in the file either.

        Raises:
            CheckpointError: the file cannot be read or is of another model.
            InputError: not a schedule, or groups that do not divide the file's widths.
        """
        state = read_published_weights(path, anchor_key="quantize.embedding.weight")
        model = cls(scales=tuple(scales), norm_groups=norm_groups, **published_sizes(state, source=str(path)))
        load_strict(model, from_published_layout(state), source=str(path))
        return model.eval()

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of an image."""
        return self.quantize.schedule

    @property
    def downsample_factor(self) -> int:
        """Image pixels per site of the feature map along each side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """Height and width of the images that fit the schedule."""
        return self.schedule.last_side * self.downsample_factor

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the feature map of an image of `image_size` pixels (side, or height and width).

        Raises:
            InputError: not the size that the schedule is made for.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height != self.image_size or width != self.image_size:
            raise InputError(
                f"the scales {list(self.schedule.sides)} are for {self.image_size}x{self.image_size} images, "
                f"got {height}x{width}; resize the image or choose another schedule."
            )
        return self.schedule.last_side, self.schedule.last_side

    def encode(self, images: Tensor) -> MultiScaleEncoding:
        """Tokenize `images` [B, C, H, W] in [-1, 1].

        Raises:
            InputError: wrong rank or channel count, or another size than `image_size`.
        """
        latents = self._latents(images)
        with torch.autocast(latents.device.type, enabled=False):
            indices, _, maps = self.quantize.encode(latents.float())
        return MultiScaleEncoding(latents, maps[-1], indices)

    def encode_tokens(self, images: Tensor) -> Tensor:
        """The token ids [B, L] that `decode_tokens` takes, of `images`; see `encode`."""
        return self.encode(images).indices

    def decode(self, quantized: Tensor) -> Tensor:
        """Images [B, C, H, W], not clamped, from a feature map [B, D, n, n]; of any scale, for a preview.

        Raises:
            InputError: not of shape [B, D, h, w].
        """
        check_latents(quantized, self.config.codebook_dim)
        return self.decoder(self.post_quant_conv(quantized.to(self.post_quant_conv.weight.dtype)))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Images [B, C, H, W], not clamped, from all tokens [B, L], scale after scale.

        Args:
            token_ids: -1 where there is no token: a scale that has none adds nothing.

        Raises:
            InputError: not integers, outside [-1, codebook_size), or not L of them.
        """
        check_integers(token_ids)
        if token_ids.ndim != 2 or token_ids.shape[1] != self.schedule.num_tokens:
            raise InputError(
                f"token ids must have shape [B, {self.schedule.num_tokens}] for the scales "
                f"{list(self.schedule.sides)}, got {list(token_ids.shape)}."
            )
        check_range(token_ids, self.codebook_size, least=-1)
        return self.decode(self.quantize.feature_maps(token_ids.long())[-1])

    def forward(self, images: Tensor, quantize: bool = True) -> VQTrainingOutput:
        """One training pass over `images` [B, C, H, W]; gradients skip the quantiser (straight-through).

        Args:
            quantize: False decodes the latents as they are, for the first steps, in which there is nothing worth
                quantising yet.
        """
        latents = self._latents(images)
        with torch.autocast(latents.device.type, enabled=False):
            wide = latents.float()
            indices, sites, maps = self.quantize.encode(wide)
            passed = wide + (maps[-1] - wide).detach() if quantize else wide
        return VQTrainingOutput(
            reconstruction=self.decode(passed),
            latents=wide.expand(len(maps), *wide.shape),
            quantized=torch.stack(maps),
            indices=indices,
            similarity=None,
            sites=sites.flatten(0, 1),
            rows=self.quantize.lookup(indices).detach().flatten(0, 1),
        )

    def _latents(self, images: Tensor) -> Tensor:
        check_images(images, self.config.in_channels)
        self.grid((images.shape[2], images.shape[3]))
        return self.quant_conv(self.encoder(images))


# -- the published layout ------------------------------------------------------------------------------

USAGE = "quantize.ema_vocab_hit_SV"
"""A statistic of the training code."""


def published_sizes(state: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Constructor arguments of a state dict in the published layout.

    Raises:
        CheckpointError: it is of another model.
    """
    try:
        sizes = network_sizes(state)
        codebook_size, codebook_dim = state["quantize.embedding.weight"].shape
        convolutions = count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
    except KeyError as error:
        raise CheckpointError(
            f"{source} does not fit MultiScaleVQModel: it lacks {error.args[0]}."
        ) from error
    return {
        **sizes,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "shared_convolutions": convolutions,
    }


def from_published_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict with the names of `MultiScaleVQModel`; the fused q, k, v are taken apart."""
    levels = count(state, r"decoder\.up\.(\d+)\.block\.0\.norm1\.weight")
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key == USAGE:
            continue
        name = block_name(key, levels, attention=True)
        name = name.replace("quantize.quant_resi.qresi_ls.", "quantize.phi.")
        match = re.search(r"\.qkv\.(weight|bias)$", name)
        if match and tensor.shape[0] % 3 == 0:
            stem = name[: match.start()]
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{stem}.{part}.{match[1]}"] = piece.clone()
        else:
            result[name] = tensor
    return result
