"""Accelerators, one file per method. Importing the package registers all of them."""

from varaccel.accelerators import (
    auto,
    code,
    cspd,
    fast_var,
    feature_cache,
    fewer_steps,
    jacobi,
    lantern,
    plain,
    scale_plan,
    skip_var,
    speculative,
    zipar,
)
from varaccel.engine.accelerator import (
    ACCELERATORS,
    Accelerator,
    AnyAccelerator,
    fitting,
    make_accelerator,
    register,
    resolve_accelerator,
)

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "AnyAccelerator",
    "auto",
    "code",
    "cspd",
    "fast_var",
    "feature_cache",
    "fewer_steps",
    "fitting",
    "jacobi",
    "lantern",
    "make_accelerator",
    "plain",
    "register",
    "resolve_accelerator",
    "scale_plan",
    "skip_var",
    "speculative",
    "zipar",
]
