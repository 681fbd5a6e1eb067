"""A model of our own: an image GPT whose tokens are pixels in 64 colours. Untrained, it draws noise."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from varaccel import LlamaGenPipeline
from varaccel.models.llamagen import Attention, Block, FeedForward
from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.rotary import rotary_table


class PixelGPT(ModelMixin, ConfigMixin):
    """The network: one block that is run twice, and all of `varaccel.hosts.causal.session.CausalNetwork`."""

    prefix_length, num_tokens = 1, 256  # a slot for the class, then 16 x 16 pixels

    @register_to_config
    def __init__(self, dim=64, vocab_size=64, grid_size=16, num_classes=3, model_type="c2i") -> None:
        super().__init__()
        self.embed_condition = nn.Sequential(nn.Embedding(num_classes + 1, dim), nn.Unflatten(1, (1, dim)))
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.block = Block(Attention(dim, 2, 2, 0.0), FeedForward(dim, 4 * dim, 0.0), dim, 1e-5)
        self.logits = nn.Linear(dim, vocab_size)

    def unconditional(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.config.num_classes)

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        return self.block(self.block(x, attention, 0), attention, 1)

    def rotary_table(self, device: torch.device | None = None) -> Tensor:
        return rotary_table(16, 32, prefix=1, device=device)

    def new_cache(self, batch: int, spare: int = 0) -> KVCache:
        sizes = {"layers": 2, "heads": 2, "slots": 257 + spare, "head_dim": 32}
        return KVCache(batch=batch, **sizes, dtype=self.dtype, device=self.device)


class Palette(ModelMixin, ConfigMixin):
    """The image tokenizer: a code is one of four levels of red, of green and of blue, from -1 to 1."""

    codebook_size, downsample_factor = 64, 1

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.colors = nn.Embedding.from_pretrained(torch.cartesian_prod(*[torch.linspace(-1, 1, 4)] * 3))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        return self.colors(token_ids).permute(0, 3, 1, 2)  # [B, h, w] -> [B, 3, h, w]


pipe = LlamaGenPipeline(PixelGPT(), Palette(), class_names=("noon", "sunset", "night"))
print(pipe("sunset", seed=0, accelerator="jacobi").stats)
