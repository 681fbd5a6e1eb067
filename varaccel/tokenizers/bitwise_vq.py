"""Bitwise multi-scale image tokenizer of Infinity: every token is the signs of a residual, one bit per channel.

Source: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis" (arXiv
2412.04431), sections 3.2 (binary spherical quantisation of residuals) and 3.4 (bitwise self-correction); binary
spherical quantisation is Zhao et al., arXiv 2406.07548. Layout of the published `infinity_vae_d*.pth`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from varaccel.errors import CheckpointError, InputError
from varaccel.nn.checkpoints import load_strict, read_published_weights
from varaccel.nn.scale_schedule import NO_TOKEN, ScaleSchedule
from varaccel.tokenizers.blocks import Decoder, Encoder
from varaccel.tokenizers.level_layout import block_name, count, network_sizes
from varaccel.tokenizers.vq import check_images, check_integers, check_latents

MAX_BITS = 62
"""Bits that a token id can hold beside the sign of an int64 and `NO_TOKEN`."""


def pack_bits(bits: Tensor) -> Tensor:
    """Token ids [...] int64 of bits [..., D], bool or integers 0 and 1: bit j has weight 2 ** j.

    Raises:
        InputError: more than 62 bits.
    """
    _check_bits(bits.shape[-1])
    places = torch.arange(bits.shape[-1], device=bits.device)
    return (bits.long() << places).sum(-1)


def unpack_bits(token_ids: Tensor, bits: int) -> Tensor:
    """The bits [..., D] bool of token ids [...] int64, D = `bits`; those of `NO_TOKEN` mean nothing.

    Raises:
        InputError: more than 62 bits.
    """
    _check_bits(bits)
    places = torch.arange(bits, device=token_ids.device)
    return ((token_ids.unsqueeze(-1) >> places) & 1).bool()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise InputError(
            f"a token id holds 1 to {MAX_BITS} bits, got {bits}; choose a tokenizer of fewer bits per token."
        )


@dataclass(frozen=True)
class BitwiseEncoding:
    """What `BitwiseQuantizer.encode` returns.

    Attributes:
        indices: [B, L] int64, the signs of what was left at every scale, packed; the labels of training.
        fed: [B, L] int64, what was added to the feature map: `indices` with the flipped bits.
        feature_map: [B, d, H_f, W_f] float32, the sum over all scales.
    """

    indices: Tensor
    fed: Tensor
    feature_map: Tensor


@dataclass(frozen=True)
class BitwiseQuantizer:
    """Residual binary spherical quantisation over the scales of a schedule, and the map that the scales add up to.

    The tokenizer's cells are those of the schedule, or patchify x patchify times as many: a token has the bits of a
    whole patch of cells, D = patchify ** 2 * d, ordered by channel, then row, then column in the patch. It keeps no
    weights, and everything runs in float32.

    Attributes:
        schedule: the scales, in tokens.
        bits: number d of bits of a cell, which is that of channels of the feature map.
        patchify: cells per token along each side.
        device: of the feature map.

    Raises:
        InputError: more than 62 bits per token, or no patch.
    """

    schedule: ScaleSchedule
    bits: int
    patchify: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        _check_patchify(self.patchify)
        _check_bits(self.token_bits)

    @property
    def token_bits(self) -> int:
        """Number D of bits of a token."""
        return self.bits * self.patchify**2

    @property
    def codebook_size(self) -> int:
        """Number 2 ** D of token ids."""
        return 2**self.token_bits

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Height H_f and width W_f of the feature map."""
        return self._cells(len(self.schedule) - 1)

    def start(self, batch: int) -> Tensor:
        """The feature map before the first scale: zeros [B, d, H_f, W_f] float32."""
        return torch.zeros(batch, self.bits, *self.feature_grid, device=self.device)

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [B, P] as float32 code vectors [B, P, D]; those of -1 are zeros.

        A cell's part of a code vector has length 1: its numbers are ±1 / sqrt(d).
        """
        signs = unpack_bits(indices, self.token_bits).float() * 2 - 1
        return torch.where(indices.unsqueeze(-1) < 0, 0.0, signs / math.sqrt(self.bits))

    def spread(self, vectors: Tensor, scale: int) -> Tensor:
        """What a scale's vectors [B, h*w, D] add to the feature map: [B, d, H_f, W_f] float32, bilinear."""
        cells = self._as_map(vectors.float(), scale)
        return cells if cells.shape[2:] == self.feature_grid else _bilinear(cells, self.feature_grid)

    def look(self, feature_map: Tensor, scale: int) -> Tensor:
        """What a scale sees of the scales before it: the feature map at its cells, bilinear, [B, h*w, D] float32."""
        cells = self._cells(scale)
        x = feature_map.float()
        return self._as_tokens(x if x.shape[2:] == cells else _bilinear(x, cells))

    @torch.no_grad()
    def encode(self, latents: Tensor, flips: Tensor | None = None) -> BitwiseEncoding:
        """Greedy residual quantisation of what the encoder says, all scales.

        At every scale, the bits are the signs of the average of what is left in each cell (0 where that is exactly
        zero), and what they add to the feature map is taken off.

        Args:
            latents: [B, d, H_f, W_f].
            flips: [B, L] int64, the bits of every token that are turned over before they are added, as a model in use
                does when it errs; what is left for later scales tells how to correct them. See `draw_flips`.

        Raises:
            InputError: latents or flips of another shape.
        """
        if latents.ndim != 4 or latents.shape[1:] != (self.bits, *self.feature_grid):
            raise InputError(
                f"this schedule quantises latents of shape [B, {self.bits}, {self.feature_grid[0]}, "
                f"{self.feature_grid[1]}], got {list(latents.shape)}; choose the schedule of the image's size."
            )
        batch, tokens = len(latents), self.schedule.num_tokens
        if flips is None:
            flips = torch.zeros(batch, tokens, dtype=torch.int64, device=latents.device)
        elif flips.shape != (batch, tokens):
            raise InputError(
                f"flips must have shape [{batch}, {tokens}], one entry per token, got {list(flips.shape)}."
            )
        with torch.autocast(latents.device.type, enabled=False):
            rest = latents.float()
            feature_map = torch.zeros_like(rest)
            indices, fed = [], []
            for scale in range(len(self.schedule)):
                cells = self._cells(scale)
                seen = rest if rest.shape[2:] == cells else F.adaptive_avg_pool2d(rest, cells)
                indices.append(pack_bits(self._as_tokens(seen) > 0))
                fed.append(indices[-1] ^ flips[:, self.schedule.span(scale)])
                part = self.spread(self.lookup(fed[-1]), scale)
                feature_map = feature_map + part
                rest = rest - part
        return BitwiseEncoding(torch.cat(indices, 1), torch.cat(fed, 1), feature_map)

    def feature_maps(self, indices: Tensor, scales: int | None = None) -> list[Tensor]:
        """The feature map after each of the first `scales` scales (all if None), [B, d, H_f, W_f] float32 each.

        Args:
            indices: [B, L], or without the scales that are left out.
        """
        maps, current = [], self.start(len(indices)).to(indices.device)
        for scale in range(len(self.schedule) if scales is None else scales):
            current = current + self.spread(self.lookup(indices[:, self.schedule.span(scale)]), scale)
            maps.append(current)
        return maps

    def inputs(self, indices: Tensor) -> Tensor:
        """What a next-scale model is fed in training: what scales 1 to S - 1 see, one after the other, float32.

        Args:
            indices: [B, L] or without the last scale; with flipped bits if the model is to learn to correct them
                (`BitwiseEncoding.fed`).

        Returns:
            [B, L - h_0 * w_0, D].
        """
        maps = self.feature_maps(indices, len(self.schedule) - 1)
        if not maps:
            return self.look(self.start(len(indices)), 0)[:, :0].to(indices.device)
        return torch.cat([self.look(current, scale) for scale, current in enumerate(maps, start=1)], 1)

    def draw_flips(
        self, batch: int, probabilities: Sequence[float], generator: torch.Generator | None = None
    ) -> Tensor:
        """Which bits to turn over in `encode`: [B, L] int64, on the generator's device (the quantiser's without one).

        Args:
            batch: number of images.
            probabilities: of a bit of every scale; see `flip_probabilities`.
            generator: of the draws.

        Raises:
            InputError: not one probability per scale, or one outside [0, 1].
        """
        if len(probabilities) != len(self.schedule) or not all(0 <= p <= 1 for p in probabilities):
            raise InputError(
                f"flips need {len(self.schedule)} probabilities in [0, 1], one per scale, got {list(probabilities)}."
            )
        device = self.device if generator is None else generator.device
        limit = torch.tensor(probabilities, device=device)[
            torch.tensor(self.schedule.scale_of_tokens(), device=device)
        ]  # [L]
        shape = (batch, self.schedule.num_tokens, self.token_bits)
        draws = torch.rand(shape, generator=generator, device=device)
        return pack_bits(draws < limit.unsqueeze(-1))

    def _cells(self, scale: int) -> tuple[int, int]:
        """Height and width of a scale in cells of the tokenizer."""
        height, width = self.schedule.grids[scale]
        return height * self.patchify, width * self.patchify

    def _as_tokens(self, cells: Tensor) -> Tensor:
        """Cells [B, d, h * patchify, w * patchify] as tokens [B, h*w, D]."""
        return F.pixel_unshuffle(cells, self.patchify).flatten(2).mT

    def _as_map(self, vectors: Tensor, scale: int) -> Tensor:
        """Tokens [B, h*w, D] as cells [B, d, h * patchify, w * patchify]."""
        return F.pixel_shuffle(vectors.mT.unflatten(2, self.schedule.grids[scale]), self.patchify)


def flip_probabilities(
    scales: int, strength: float = 0.3, generator: torch.Generator | None = None
) -> tuple[float, ...]:
    """Probabilities of flipping a bit of each scale in one training batch: 0, 0.01, … or `strength`, all as likely.

    Args:
        scales: how many.
        strength: the largest one; 0.3 in the published training.
        generator: of the draws.

    Raises:
        InputError: a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise InputError(f"the strength of bit flips must lie in [0, 1], got {strength}.")
    device = None if generator is None else generator.device
    hundredths = torch.randint(round(strength * 100) + 1, (scales,), generator=generator, device=device)
    return tuple(each / 100 for each in hundredths.tolist())


def _bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def published_groups(channels: int) -> int:
    """Groups of a GroupNorm of Infinity's tokenizer: 32 where the channels allow it, else 24.

    Raises:
        InputError: channels that allow neither.
    """
    for groups in (32, 24):
        if channels % groups == 0:
            return groups
    raise InputError(
        f"the widths of a BitwiseVQModel must be multiples of 32 or 24, got {channels}; change base_channels."
    )


class BitwiseVQModel(ModelMixin, ConfigMixin):
    """Convolutional encoder and decoder without attention, with one bit per channel between them.

    Images are RGB in [-1, 1], of any size that a schedule fits; decoded images are not clamped.

    Args:
        in_channels: image channels.
        base_channels: width of the full-resolution level.
        channel_multipliers: width of each level in units of `base_channels`, full resolution first; every
            level but the last halves height and width.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        bits: number d of bits of a cell, which is that of channels of the feature map.
        patchify: cells per token of the transformer along each side: 1, or 2 with the 8B model.
        dropout: dropout inside residual blocks, active in training only.

    Raises:
        InputError: sizes that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4, 4),
        num_res_blocks: int = 2,
        bits: int = 32,
        patchify: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not channel_multipliers or min(base_channels, *channel_multipliers, num_res_blocks, bits) < 1:
            raise InputError(
                "every size of a BitwiseVQModel must be at least 1 and there must be at least one level."
            )
        _check_patchify(patchify)
        shape = (
            in_channels,
            base_channels,
            tuple(channel_multipliers),
            num_res_blocks,
            bits,
            published_groups,
            dropout,
        )
        self.encoder = Encoder(*shape, attention=False)
        self.decoder = Decoder(*shape, attention=False)

    @classmethod
    def from_original(cls, path: str | os.PathLike[str], *, patchify: int = 1) -> BitwiseVQModel:
        """Load a published file, such as `infinity_vae_d32reg.pth`, or one of another size in its layout.

        Args:
            path: the `.pth` or `.safetensors` file; weights bare or under "vae", layers wrapped or not.
            patchify: not in the file; 2 for `infinity_vae_d56_f8_14_patchify.pth`, 1 for all others.

        Raises:
            CheckpointError: the file cannot be read or is of another model.
            InputError: widths that no GroupNorm of this tokenizer has, or no patch.
        """
        state = read_published_weights(
            path, anchor_key=("encoder.conv_in.conv.weight", "encoder.conv_in.weight")
        )
        state = unwrapped(state)
        model = cls(patchify=patchify, **published_sizes(state, source=str(path)))
        load_strict(model, from_published_layout(state), source=str(path))
        return model.eval()

    @property
    def bits(self) -> int:
        """Number d of bits of a cell."""
        return int(self.config.bits)

    @property
    def token_bits(self) -> int:
        """Number D of bits of a token."""
        return self.bits * int(self.config.patchify) ** 2

    @property
    def downsample_factor(self) -> int:
        """Image pixels per cell along each side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    def quantizer(self, schedule: ScaleSchedule) -> BitwiseQuantizer:
        """The quantiser for images of a schedule, on this model's device.

        Raises:
            InputError: tokens of more than 62 bits.
        """
        return BitwiseQuantizer(schedule, self.bits, int(self.config.patchify), self.device)

    def image_size(self, schedule: ScaleSchedule) -> tuple[int, int]:
        """Height and width in pixels of the images of a schedule."""
        height, width = schedule.last_grid
        pixels = self.downsample_factor * int(self.config.patchify)
        return height * pixels, width * pixels

    def encode(self, images: Tensor) -> Tensor:
        """The latents [B, d, H / f, W / f] of `images` [B, C, H, W] in [-1, 1], before quantisation.

        Raises:
            InputError: wrong rank or channel count, or sides that are no multiples of f, `downsample_factor`.
        """
        check_images(images, self.config.in_channels)
        factor = self.downsample_factor
        if images.shape[2] % factor or images.shape[3] % factor:
            raise InputError(
                f"image sides must be multiples of {factor}, got {images.shape[2]}x{images.shape[3]}; "
                "resize or crop the image."
            )
        return self.encoder(images.to(self.dtype))

    def encode_tokens(self, images: Tensor, schedule: ScaleSchedule) -> Tensor:
        """The token ids [B, L] int64, scale after scale, of `images` [B, C, H, W] in [-1, 1].

        Raises:
            InputError: wrong rank or channel count, or images of another size than `image_size(schedule)`.
        """
        check_images(images, self.config.in_channels)
        height, width = self.image_size(schedule)
        if images.shape[2:] != (height, width):
            raise InputError(
                f"this schedule is for {height}x{width} images, got {images.shape[2]}x{images.shape[3]}; "
                "resize the image or choose another schedule."
            )
        return self.quantizer(schedule).encode(self.encode(images)).indices

    def decode(self, feature_map: Tensor) -> Tensor:
        """Images [B, C, H, W], not clamped, from a feature map [B, d, h, w]; of any scale, for a preview.

        Raises:
            InputError: not of shape [B, d, h, w].
        """
        check_latents(feature_map, self.bits)
        return self.decoder(feature_map.to(self.dtype))

    def decode_tokens(self, token_ids: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Images [B, C, H, W], not clamped, from all tokens [B, L], scale after scale; -1 where there is none.

        Raises:
            InputError: not integers, outside [-1, 2 ** D), or not L of them.
        """
        check_integers(token_ids)
        if token_ids.ndim != 2 or token_ids.shape[1] != schedule.num_tokens:
            raise InputError(
                f"token ids must have shape [B, {schedule.num_tokens}] for this schedule, "
                f"got {list(token_ids.shape)}."
            )
        quantizer, token_ids = self.quantizer(schedule), token_ids.long()
        if token_ids.numel() and not (
            NO_TOKEN <= int(token_ids.min()) <= int(token_ids.max()) < quantizer.codebook_size
        ):
            raise InputError(
                f"token ids of {quantizer.token_bits} bits must lie in [0, 2 ** {quantizer.token_bits}), "
                f"or be {NO_TOKEN} where there is no token."
            )
        return self.decode(quantizer.feature_maps(token_ids)[-1])


def _check_patchify(patchify: int) -> None:
    if patchify not in (1, 2):
        raise InputError(f"patchify is 1 or 2 cells per token along each side, got {patchify}.")


# -- the published layout ------------------------------------------------------------------------------

_MASK = re.compile(r"quantizer?\.lfq\.mask")
"""Powers of two that nothing reads, under two names."""

# every layer lies in a module of its own; resampling layers are also called `conv` without one
_WRAPPER = re.compile(r"(?<!\.downsample)(?<!\.upsample)\.(?:conv|norm)\.(?=(?:weight|bias)$)")


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without the names of the modules that wrap convolutions and norms, and its masks."""
    return {_WRAPPER.sub(".", key): tensor for key, tensor in state.items() if not _MASK.fullmatch(key)}


def published_sizes(state: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Constructor arguments of an unwrapped state dict in the published layout.

    Raises:
        CheckpointError: it is of another model.
    """
    try:
        return {**network_sizes(state), "bits": state["encoder.conv_out.weight"].shape[0]}
    except KeyError as error:
        raise CheckpointError(f"{source} does not fit BitwiseVQModel: it lacks {error.args[0]}.") from error


def from_published_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An unwrapped state dict with the names of `BitwiseVQModel`."""
    levels = count(state, r"decoder\.up\.(\d+)\.block\.0\.norm1\.weight")
    return {block_name(key, levels, attention=False): tensor for key, tensor in state.items()}
