"""AdamW with moments of 16 bits: the first in 1-6-9, the second in 0-6-10 (paper, appendix B.2)."""

import logging
import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dalle_ds.ops.compiling import compiled
from dalle_ds.ops.devices import on_device
from dalle_ds.ops.kernel_compiler import kernel_problem
from dalle_ds.ops.low_bit import FORMAT_0_6_10, FORMAT_1_6_9, decode, encode_wide

log = logging.getLogger(__name__)

Moments = Literal["fp32", "low_bit"]
Master = Literal["fp32", "none"]

VARIANCE_CLIP = 5.0
"""The paper's (appendix B.2)."""

COMPILE_FROM = 1 << 22
"""Parameters of at least so many values are updated by one compiled loop: four times as fast on CPUs, after some seconds."""

_DTYPES = {"fp32": torch.float32, "low_bit": torch.int16}
_MOMENTS = ("exp_avg", "exp_avg_sq")

# A chunk of values and its temporaries stay in a core's caches, and each thread takes one. Operation by operation there are
# many temporaries, so chunks are small; the compiled loop has two, and calling it costs as much as thousands of values. A GPU
# needs more to be busy, and has the memory for it.
_PLAIN_CHUNK, _COMPILED_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 18, 1 << 24


class LowBitAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, but for how a group keeps its moments, and for the clip of the second one.

    A parameter group's option `moments` says "low_bit" (the default) or "fp32"; the paper keeps fp32 moments for gains, biases,
    embeddings and unembeddings (appendix D). Within a step all arithmetic is fp32, and moments are rounded only to be stored:
    the update of the parameters uses them as they were computed.

    In every group the running estimate of the variance is clipped by value before anything uses it, the parameters' update and
    the stored moment alike (appendix B.2); torch's bias correction, of which the paper says nothing, comes after.

    Parameters are fp32 and contiguous, as the flat partitions of ZeRO are. State names are torch's: step, exp_avg, exp_avg_sq.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        variance_clip: float = VARIANCE_CLIP,
        moments: Moments = "low_bit",
        compile_from: int = COMPILE_FROM,
    ) -> None:
        if not 0 < variance_clip <= FORMAT_0_6_10.largest:
            raise ValueError(f"variance_clip {variance_clip}: expected above 0, up to the format's {FORMAT_0_6_10.largest}")
        self._compile_from = compile_from
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variance_clip": variance_clip,
            "moments": moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError where the group's `moments` are neither "fp32" nor "low_bit"."""
        moments = param_group.get("moments", self.defaults["moments"])
        if moments not in _DTYPES:
            raise ValueError(f"moments {moments!r}: expected one of {', '.join(_DTYPES)}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; moments of another format than their group's are refused by the next step."""
        # torch casts all state to the parameter's fp32: moments are kept from it and put in afterwards, as they are
        rest = {i: {k: v for k, v in s.items() if k not in _MOMENTS} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": rest})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            saved = state_dict["state"].get(i, {})
            self.state[parameter] |= {key: saved[key].to(parameter.device) for key in _MOMENTS if key in saved}

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if parameter.dtype is not torch.float32:
            raise ValueError(f"parameter of {parameter.dtype}: this optimizer updates fp32 master weights")
        state, low_bit = self.state[parameter], group["moments"] == "low_bit"
        if not state:
            state["step"] = torch.zeros(())
            for key in _MOMENTS:  # code 0 is the number 0
                state[key] = torch.zeros_like(parameter, dtype=_DTYPES[group["moments"]])
        for key in _MOMENTS:
            if state[key].dtype is not _DTYPES[group["moments"]]:
                raise ValueError(f"{key} is {state[key].dtype}, but the group's moments are {group['moments']}")
        state["step"] += 1
        scalars = on_device(scalars_of(state["step"].item(), group), parameter.device)
        compiled = low_bit and parameter.numel() >= self._compile_from
        chunk = _GPU_CHUNK
        if parameter.device.type == "cpu":
            chunk = (_COMPILED_CHUNK if compiled else _PLAIN_CHUNK) * torch.get_num_threads()
        tensors = (parameter, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for pieces in zip(*(t.view(-1).split(chunk) for t in tensors), strict=True):
            if compiled:
                _compiled_update(*pieces, scalars)
            else:
                _update_chunk(*pieces, scalars, low_bit)


class HasState(Protocol):
    """torch's optimizers, and what keeps its state as they do."""

    state: Any


def moment_bytes(optimizer: HasState) -> int:
    """Bytes of the moments that `optimizer` keeps at present: none before its first step."""
    kept = (state[key] for state in optimizer.state.values() for key in _MOMENTS if key in state)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def scalars_of(step: float, group: dict[str, Any]) -> Tensor:
    """What `_update_chunk` unpacks: as one tensor, so that a compiled loop takes new values without being compiled anew."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    decay, step_size = 1 - lr * group["weight_decay"], lr / (1 - beta1**step)
    correction = math.sqrt(1 - beta2**step)
    return torch.tensor([decay, 1 - beta1, beta2, 1 - beta2, -step_size, correction, group["eps"], group["variance_clip"]])


def _update_chunk(p: Tensor, g: Tensor, stored_mean: Tensor, stored_variance: Tensor, scalars: Tensor, low_bit: bool) -> None:
    """One update in place. Without a compiler, the same as torch's own loop to the last bit."""
    mean = decode(stored_mean, FORMAT_1_6_9) if low_bit else stored_mean
    variance = decode(stored_variance, FORMAT_0_6_10) if low_bit else stored_variance
    moved, mean, variance = moved_by_adamw(p, g, mean, variance, scalars)
    p.copy_(moved)
    stored_mean.copy_(encode_wide(mean, FORMAT_1_6_9) if low_bit else mean)
    stored_variance.copy_(encode_wide(variance, FORMAT_0_6_10) if low_bit else variance)


def moved_by_adamw(p: Tensor, g: Tensor, mean: Tensor, variance: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 -> parameters and moments after one update. The operations of torch's own loop in its order."""
    decay, new1, beta2, new2, minus_step, correction, eps, clip = scalars.unbind()
    mean = torch.lerp(mean, g, new1)
    variance = torch.addcmul(variance * beta2, new2 * g, g).minimum(clip)
    return p * decay + minus_step * mean / (variance.sqrt() / correction + eps), mean, variance


@cache
def _compiled_loop() -> Callable[..., None]:
    return compiled(_update_chunk, dynamic=True)


def _compiled_update(p: Tensor, g: Tensor, stored_mean: Tensor, stored_variance: Tensor, scalars: Tensor) -> None:
    """Low-bit `_update_chunk` as one loop; where nothing can compile it (no C++ compiler), operation by operation."""
    on_cpu = p.device.type == "cpu"
    if _can_compile and not on_cpu and (problem := kernel_problem()):
        _go_on_uncompiled(problem)
    if not _can_compile:
        return _update_chunk(p, g, stored_mean, stored_variance, scalars, True)
    # inductor writes vector instructions for int32 on CPUs, but a loop of single values for int16, five times slower
    mean, variance = (t.to(torch.int32) if on_cpu else t for t in (stored_mean, stored_variance))
    try:
        _compiled_loop()(p, g, mean, variance, scalars, True)
    except RuntimeError as error:
        if not _is_of_the_compiler(error):
            raise
        _go_on_uncompiled(str(error).strip().splitlines()[0])
        return _update_chunk(p, g, stored_mean, stored_variance, scalars, True)
    if on_cpu:
        stored_mean.copy_(mean)
        stored_variance.copy_(variance)
    return None


def _go_on_uncompiled(reason: str) -> None:
    global _can_compile
    _can_compile = False
    log.warning("low-bit AdamW runs uncompiled, several times slower: %s", reason)


def _is_of_the_compiler(error: RuntimeError) -> bool:
    """Such an error comes before anything is written. Memory that lacks while it compiles is not one: that will lack again."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second, which only those who compile should wait

    lacks_memory = isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError)
    return isinstance(error, TorchDynamoException) and not lacks_memory


_can_compile = True
