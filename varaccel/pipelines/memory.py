"""Running out of memory, said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from varaccel.errors import VaraccelError


class OutOfMemory(VaraccelError, RuntimeError):
    """The call needs more memory than the device has."""


@contextmanager
def memory_errors(images: int) -> Iterator[None]:
    """Turn an allocation failure inside the block into `OutOfMemory`.

    Args:
        images: images of the call, for the advice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_advice(images)) from error
    except RuntimeError as error:
        # the CPU allocator has no error type of its own
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(_advice(images)) from error


def _advice(images: int) -> str:
    fewer = f"make fewer than {images} images in one call, or " if images > 1 else ""
    return f"out of memory: {fewer}load the model with dtype=torch.bfloat16."
