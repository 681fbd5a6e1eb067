"""Decoding. Importing the package registers every accelerator of the library."""

from varaccel.decoding import (
    auto,
    code,
    cspd,
    feature_cache,
    fewer_steps,
    jacobi,
    lantern,
    plain,
    speculative,
    zipar,
)

__all__ = [
    "auto",
    "code",
    "cspd",
    "feature_cache",
    "fewer_steps",
    "jacobi",
    "lantern",
    "plain",
    "speculative",
    "zipar",
]
