"""What networks are called with. These names are what a network of one's own needs."""

from varaccel.nn.attention_inputs import AttentionInputs
from varaccel.nn.condition import Condition
from varaccel.nn.grid import Grid
from varaccel.nn.kv_cache import KVCache
from varaccel.nn.prefix import Prefix, PrefixConditioned
from varaccel.nn.rotary import rotary_table
from varaccel.nn.signature import Signature

__all__ = [
    "AttentionInputs",
    "Condition",
    "Grid",
    "KVCache",
    "Prefix",
    "PrefixConditioned",
    "Signature",
    "rotary_table",
]
