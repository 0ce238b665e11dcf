"""AdamW with a clipped variance and, as an option, 16-bit moments: 1-6-9 and 0-6-10 (paper, appendix B.2)."""

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
"""Upper limit of the running variance (paper, appendix B.2)."""

COMPILE_FROM = 1 << 22
"""Parameters with at least this many values are updated by one compiled loop.
Compiling takes some seconds; the loop is then four times as fast on CPUs."""

_DTYPES = {"fp32": torch.float32, "low_bit": torch.int16}
_MOMENTS = ("exp_avg", "exp_avg_sq")

# Values per chunk. Each thread takes one chunk, and the chunk and its temporaries should stay in a core's caches. Without
# compilation there are many temporaries, so chunks are small. The compiled loop has two temporaries, and calling it costs as
# much as thousands of values. A GPU needs larger chunks to be busy, and has the memory for them.
_PLAIN_CHUNK, _COMPILED_CHUNK, _GPU_CHUNK = 1 << 15, 1 << 18, 1 << 24


class ClippedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with a clipped second moment and, as an option, 16-bit moments.

    Each parameter group has an option `moments`: "low_bit" (the default) or "fp32". The paper keeps fp32 moments for gains,
    biases, embeddings and unembeddings (appendix D). Within a step, all arithmetic is fp32. Moments are rounded only when they
    are stored: the update of the parameters uses the unrounded moments.

    In every group, the running variance is clipped by value before it is stored and before it updates the parameters (appendix
    B.2). torch's bias correction, which the paper does not mention, comes after the clipping.

    Parameters must be fp32 and contiguous, like ZeRO's flat partitions. State keys are torch's: step, exp_avg, exp_avg_sq.

    Raises:
        ValueError: `variance_clip` is not above 0 or exceeds the largest value of the format 0-6-10.
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
            raise ValueError(f"variance_clip is {variance_clip}, expected above 0 and at most {FORMAT_0_6_10.largest} (0-6-10)")
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
        """Add a parameter group. Raises ValueError if its `moments` are neither "fp32" nor "low_bit"."""
        moments = param_group.get("moments", self.defaults["moments"])
        if moments not in _DTYPES:
            raise ValueError(f"moments is {moments!r}, expected one of {', '.join(_DTYPES)}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient."""
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
        """Load a state dict. If moments are not in their group's format, the next step raises ValueError."""
        # torch casts all state to the parameter's dtype, fp32. Withhold the moments from it and add them afterwards, unchanged.
        rest = {i: {k: v for k, v in s.items() if k not in _MOMENTS} for i, s in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": rest})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            saved = state_dict["state"].get(i, {})
            self.state[parameter] |= {key: saved[key].to(parameter.device) for key in _MOMENTS if key in saved}

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if parameter.dtype is not torch.float32:
            raise ValueError(f"a parameter is {parameter.dtype}, expected fp32 (master weights)")
        state, low_bit = self.state[parameter], group["moments"] == "low_bit"
        if not state:
            state["step"] = torch.zeros(())
            for key in _MOMENTS:  # zeros are right for both formats: code 0 is the number 0
                state[key] = torch.zeros_like(parameter, dtype=_DTYPES[group["moments"]])
        for key in _MOMENTS:
            if state[key].dtype is not _DTYPES[group["moments"]]:
                raise ValueError(f"{key} is {state[key].dtype}, but the group's moments are {group['moments']}")
        state["step"] += 1
        scalars = on_device(scalars_of(state["step"].item(), group), parameter.device)
        compiled = parameter.numel() >= self._compile_from
        chunk = _GPU_CHUNK
        if parameter.device.type == "cpu":
            chunk = (_COMPILED_CHUNK if compiled else _PLAIN_CHUNK) * torch.get_num_threads()
        tensors = (parameter, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for pieces in zip(*(t.view(-1).split(chunk) for t in tensors), strict=True):
            if compiled:
                _compiled_update(*pieces, scalars, low_bit)
            else:
                _update_chunk(*pieces, scalars, low_bit)


class HasState(Protocol):
    """A torch optimizer, or an object with the same `state`."""

    state: Any


def moment_bytes(optimizer: HasState) -> int:
    """Bytes of the moments that `optimizer` holds now. It is 0 before the first step."""
    kept = (state[key] for state in optimizer.state.values() for key in _MOMENTS if key in state)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def scalars_of(step: float, group: dict[str, Any]) -> Tensor:
    """The scalars of an update, for `moved_by_adamw`. They are one
    tensor, so that new values don't recompile a compiled loop."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    decay, step_size = 1 - lr * group["weight_decay"], lr / (1 - beta1**step)
    correction = math.sqrt(1 - beta2**step)
    return torch.tensor([decay, 1 - beta1, beta2, 1 - beta2, -step_size, correction, group["eps"], group["variance_clip"]])


def _update_chunk(p: Tensor, g: Tensor, stored_mean: Tensor, stored_variance: Tensor, scalars: Tensor, low_bit: bool) -> None:
    """Update a chunk of parameters and moments in place. Uncompiled
    and with fp32 moments, it is bit-identical to torch's own loop."""
    mean = decode(stored_mean, FORMAT_1_6_9) if low_bit else stored_mean
    variance = decode(stored_variance, FORMAT_0_6_10) if low_bit else stored_variance
    moved, mean, variance = moved_by_adamw(p, g, mean, variance, scalars)
    p.copy_(moved)
    stored_mean.copy_(encode_wide(mean, FORMAT_1_6_9) if low_bit else mean)
    stored_variance.copy_(encode_wide(variance, FORMAT_0_6_10) if low_bit else variance)


def moved_by_adamw(p: Tensor, g: Tensor, mean: Tensor, variance: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters and moments after one update, in fp32. Same operations and order as in torch's own loop."""
    decay, new1, beta2, new2, minus_step, correction, eps, clip = scalars.unbind()
    mean = torch.lerp(mean, g, new1)
    variance = torch.addcmul(variance * beta2, new2 * g, g).minimum(clip)
    return p * decay + minus_step * mean / (variance.sqrt() / correction + eps), mean, variance


@cache
def _compiled_loop() -> Callable[..., None]:
    return compiled(_update_chunk, dynamic=True)


def _compiled_update(
    p: Tensor, g: Tensor, stored_mean: Tensor, stored_variance: Tensor, scalars: Tensor, low_bit: bool
) -> None:
    """Run `_update_chunk` as one compiled loop, or uncompiled if it can't be compiled (no C++ compiler)."""
    on_cpu = p.device.type == "cpu"
    if _can_compile and not on_cpu and (problem := kernel_problem()):
        _go_on_uncompiled(problem)
    if not _can_compile:
        return _update_chunk(p, g, stored_mean, stored_variance, scalars, low_bit)
    # On CPUs, Inductor vectorises loops over int32, but not over int16, which is five times slower.
    is_widened = on_cpu and low_bit
    mean, variance = (t.to(torch.int32) if is_widened else t for t in (stored_mean, stored_variance))
    try:
        _compiled_loop()(p, g, mean, variance, scalars, low_bit)
    except RuntimeError as error:
        if not _is_of_the_compiler(error):
            raise
        _go_on_uncompiled(str(error).strip().splitlines()[0])
        return _update_chunk(p, g, stored_mean, stored_variance, scalars, low_bit)
    if is_widened:
        stored_mean.copy_(mean)
        stored_variance.copy_(variance)
    return None


def _go_on_uncompiled(reason: str) -> None:
    global _can_compile
    _can_compile = False
    log.warning("AdamW runs uncompiled, several times slower: %s", reason)


def _is_of_the_compiler(error: RuntimeError) -> bool:
    """Whether the compiler raised the error. If so, no tensor has been written yet. Out-of-memory errors while compiling do not
    count: the uncompiled update would run out of memory too."""
    from torch._dynamo.exc import TorchDynamoException  # imported here, since the import takes a second

    lacks_memory = isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError)
    return isinstance(error, TorchDynamoException) and not lacks_memory


_can_compile = True
