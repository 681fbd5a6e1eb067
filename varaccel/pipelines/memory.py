"""Running out of memory, said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from varaccel.errors import VaraccelError
from varaccel.nn.devices import is_gpu

_SAID = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)
"""Words of the errors of a failed allocation that are plain RuntimeErrors."""

_BYTES_PER_PIXEL = 12
"""Three channels in float32, as the image tokenizer gives them."""

_BYTES_PER_GENERATOR = 5056
"""The state of a random generator of torch on a CPU; every image has one."""


class OutOfMemory(VaraccelError, RuntimeError):
    """The call needs more memory than the device has."""


@contextmanager
def memory_errors(images: int) -> Iterator[None]:
    """Turn an allocation failure inside the block into `OutOfMemory`.

    Args:
        images: images that the call decodes at once, for the advice.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:  # MemoryError comes from numpy, lists and files
        raise OutOfMemory(_advice(images)) from error
    except RuntimeError as error:
        # the CPU allocator, C++ below torch and libraries of a GPU have no error type of their own
        if not any(words in str(error) for words in _SAID):
            raise
        raise OutOfMemory(_advice(images)) from error


def check_images(images: int, pixels: int, device: torch.device) -> None:
    """Refuse, before anything is made, more images than the device can hold when they are finished.

    Args:
        images: of the call.
        pixels: of an image.

    Raises:
        OutOfMemory: see above.
    """
    if is_gpu(device):
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = psutil.virtual_memory().total
    most = there // (pixels * _BYTES_PER_PIXEL + _BYTES_PER_GENERATOR)
    if images > most:
        raise OutOfMemory(
            f"out of memory: {images:,} images in one call are more than the memory of {device} holds; make fewer than "
            f"{most + 1:,}."
        )


def _advice(images: int) -> str:
    fewer = f"decode fewer than {images} images at once (batch_size), or " if images > 1 else ""
    return f"out of memory: {fewer}load the model with dtype=torch.bfloat16."
