"""Where computation goes when nobody names a device."""

import os

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError


def gpus_are_wanted() -> bool:
    """DS_ACCELERATOR, by which DeepSpeed chooses, names nothing but cuda."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def use_cuda() -> bool:
    """Whether to compute on GPUs of this machine: torch sees one, and they are wanted."""
    return torch.cuda.is_available() and gpus_are_wanted()


def default_device() -> str:
    """ "cuda" or "cpu"."""
    return "cuda" if use_cuda() else "cpu"


def resolve_device(name: str) -> torch.device:
    """The device that a recipe or an option names; "auto" is `default_device()`.

    Raises:
        ConfigError: that is no device, or it is not there.
    """
    if name == "auto":
        return torch.device(default_device())
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch that was built without CUDA asserts
        problem = str(error).splitlines()[0]
        raise ConfigError(f"device is {name!r}, expected auto, or cpu, cuda, cuda:N of this machine: {problem}") from None


def ranks_here(at_most: int) -> int:
    """Ranks for this machine: one for each GPU, but no more than `at_most`; without GPUs so many, which share the cores."""
    return min(at_most, torch.cuda.device_count()) if use_cuda() else at_most


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. A GPU takes it from pinned memory, and the host does not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
