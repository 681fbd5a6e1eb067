"""A model of our own: an image GPT whose tokens are pixels in 64 colours. Untrained, it draws noise."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, cartesian_prod, linspace, nn

from varaccel.models.llamagen import Attention, Block, FeedForward
from varaccel.nn import AttentionInputs, KVCache, PrefixConditioned, Signature, rotary_table
from varaccel.pipelines.causal import CausalPipeline


class PixelGPT(ModelMixin, ConfigMixin, PrefixConditioned):
    """The network: a class, then 16 x 16 pixels, read by one block that is run twice."""

    @register_to_config
    def __init__(self, num_classes=3) -> None:
        super().__init__()
        self.classes, self.colors = nn.Embedding(num_classes + 1, 64), nn.Embedding(64, 64)
        self.block = Block(Attention(64, 2, 2, 0.0), FeedForward(64, 256, 0.0), 64, 1e-5)
        self.logits = nn.Linear(64, 64)

    def signature(self) -> Signature:
        return Signature("class", self.config.num_classes, vocab_size=64, layout=(16,))

    def embed_condition(self, values: Tensor) -> Tensor:
        return self.classes(values).unsqueeze(1)  # [R] -> [R, 1, 64]

    def embed_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.colors(tokens)  # the rotary table tells where they stand

    def positional(self, prefix, grids, mask) -> Tensor:
        return rotary_table(16, 32, prefix, device=self.device).unsqueeze(0)

    def transform(self, x: Tensor, attention: AttentionInputs) -> Tensor:
        return self.block(self.block(x, attention, 0), attention, 1)

    def new_cache(self, rows: int, slots: int) -> KVCache:
        sizes = {"layers": 2, "batch": rows, "heads": 2, "slots": slots, "head_dim": 32}
        return KVCache(**sizes, dtype=self.dtype, device=self.device)


class Palette(ModelMixin, ConfigMixin):  # the image tokenizer: four levels of red, of green and of blue
    codebook_size, downsample_factor = 64, 1

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", cartesian_prod(*[linspace(-1, 1, 4)] * 3))

    def decode_tokens(self, token_ids: Tensor) -> Tensor:
        return self.codebook[token_ids].permute(0, 3, 1, 2)  # [B, h, w] -> [B, 3, h, w]


class Pixels(CausalPipeline):
    family = "pixels"


pipe = Pixels(PixelGPT(), Palette(), class_names=("noon", "sunset", "night"), draft_transformer=PixelGPT())
print(pipe("sunset", seed=0, accelerator="jacobi").stats)
