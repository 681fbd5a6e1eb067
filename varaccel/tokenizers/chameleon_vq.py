"""The image tokenizer of Chameleon, and the decoder that transformers leaves out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from varaccel.errors import InputError
from varaccel.nn.checkpoints import load_strict

NO_DECODER = (
    "transformers' Chameleon has no decoder for image tokens and this checkpoint brought none; pass image_decoder=, a "
    "ChameleonImageDecoder, or ask for output_type='latent'."
)


class ChameleonImageDecoder(ModelMixin, ConfigMixin):
    """From vectors of the codebook to pixels: the decoder of VQGAN (Esser et al. 2021, arXiv 2012.09841).

    Args:
        embed_dim: width of the codebook.
        latent_channels, base_channels, channel_multiplier, num_res_blocks, out_channels: of the decoder.
        attention: also in the blocks of the lowest resolution, not only between encoder and decoder.
    """

    @register_to_config
    def __init__(
        self,
        embed_dim: int = 256,
        latent_channels: int = 256,
        base_channels: int = 128,
        channel_multiplier: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        out_channels: int = 3,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(embed_dim, latent_channels, 1)
        self.decoder = JanusVQVAEDecoder(
            JanusVQVAEConfig(
                embed_dim=embed_dim,
                latent_channels=latent_channels,
                base_channels=base_channels,
                channel_multiplier=list(channel_multiplier),
                num_res_blocks=num_res_blocks,
                out_channels=out_channels,
            )
        )
        if not attention:
            for level in self.decoder.up:
                level.attn = nn.ModuleList()

    @classmethod
    def from_state(cls, vq_config: Any, state: Mapping[str, Tensor], *, source: str) -> Self:
        """A decoder for the image tokenizer of a Chameleon model.

        Args:
            vq_config: of the model's image tokenizer.
            state: `post_quant_conv.*` and `decoder.*`, named as transformers' Janus or as the published VQGAN code
                does, which counts levels from the other end.
            source: of the weights, for messages.

        Raises:
            CheckpointError: weights of another decoder.
        """
        decoder = cls(
            embed_dim=vq_config.embed_dim,
            latent_channels=vq_config.latent_channels,
            base_channels=vq_config.base_channels,
            channel_multiplier=tuple(vq_config.channel_multiplier),
            num_res_blocks=vq_config.num_res_blocks,
            out_channels=vq_config.in_channels,
            attention=any(re.match(r"decoder\.up\.\d+\.attn\.", name) for name in state),
        )
        # only the level of the finest resolution does not double it
        finest_first = "decoder.up.0.upsample.conv.weight" not in state
        last = len(vq_config.channel_multiplier) - 1
        if finest_first and last > 0:
            state = {_level_reversed(name, last): value for name, value in state.items()}
        load_strict(decoder, state, source=source)
        return decoder.eval()

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors of the codebook [B, h, w, C] -> images [B, 3, H, W] in about [-1, 1]."""
        latents = self.post_quant_conv(vectors.permute(0, 3, 1, 2).to(self.dtype))
        pixels: Tensor = self.decoder(latents)
        return pixels


def _level_reversed(name: str, last: int) -> str:
    return re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up.{last - int(found[1])}.", name)


class ChameleonImageTokenizer:
    """The `ChameleonVQVAE` of a Chameleon model, which only encodes, and a decoder for it if there is one.

    Args:
        vqmodel: the part of the model.
        decoder: see `ChameleonImageDecoder`.

    Raises:
        InputError: a decoder for another image tokenizer.
    """

    def __init__(self, vqmodel: Any, decoder: Any = None) -> None:
        self.vqmodel, self.decoder = vqmodel, decoder
        if decoder is None:
            return
        theirs = (decoder.config.embed_dim, len(decoder.config.channel_multiplier))
        ours = (vqmodel.config.embed_dim, len(vqmodel.config.channel_multiplier))
        if theirs != ours:
            raise InputError(
                f"the image_decoder reads vectors of {theirs[0]} numbers in {theirs[1]} levels, the model's image "
                f"tokenizer has {ours[0]} in {ours[1]}; use the decoder that was published with it."
            )

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vqmodel.dtype
        return dtype

    @property
    def codebook(self) -> Tensor:
        """[V, C] vectors of the token ids."""
        codebook: Tensor = self.vqmodel.quantize.embedding.weight
        return codebook

    @property
    def codebook_size(self) -> int:
        return int(self.vqmodel.config.num_embeddings)

    @property
    def downsample_factor(self) -> int:
        """Pixels per token and axis."""
        return int(2 ** (len(self.vqmodel.config.channel_multiplier) - 1))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, h, w] -> images [B, 3, H, W] in about [-1, 1].

        Raises:
            InputError: there is no decoder.
        """
        if self.decoder is None:
            raise InputError(NO_DECODER)
        vectors = self.codebook[token_ids.to(self.codebook.device)]
        pixels: Tensor = self.decoder(vectors.to(self.decoder.device))
        return pixels

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> token ids [B, h, w]."""
        token_ids: Tensor = self.vqmodel.encode(pixels.to(self.dtype)).image_tokens
        side = pixels.shape[-1] // self.downsample_factor
        return token_ids.view(len(pixels), -1, side)
