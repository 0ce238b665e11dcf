"""Choose the compute device, and copy tensors to it."""

import os

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError


def gpus_are_wanted() -> bool:
    """Whether DS_ACCELERATOR, DeepSpeed's choice of the accelerator, is unset or "cuda"."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def use_cuda() -> bool:
    """Whether to compute on GPUs: torch sees a GPU, and `gpus_are_wanted()`."""
    return torch.cuda.is_available() and gpus_are_wanted()


def default_device() -> str:
    """Return "cuda" if `use_cuda()`, otherwise "cpu"."""
    return "cuda" if use_cuda() else "cpu"


def resolve_device(name: str) -> torch.device:
    """Return the device that a recipe or an option names. "auto" is `default_device()`.

    Raises:
        ConfigError: the name is not a device, or this machine does not have the device.
    """
    if name == "auto":
        return torch.device(default_device())
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        problem = str(error).splitlines()[0]
        known = "Expected one of" in problem  # torch lists all kinds of devices, most of which no build has
        raise ConfigError(
            f"device is {name!r}, expected auto, or cpu, cuda, cuda:N of this machine" + ("" if known else f": {problem}")
        ) from None


def ranks_here(at_most: int) -> int:
    """Number of ranks for this machine. With GPUs it is one per GPU, but at most `at_most`.
    Without GPUs it is `at_most`, and the ranks share the cores."""
    return min(at_most, torch.cuda.device_count()) if use_cuda() else at_most


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`. Copies from the host to a GPU use pinned memory, so that the host does not wait for them."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
