"""Published training runs of other projects, and the error of this folder's estimate for each.

Facts and figures are from the named sources. Anything that a source does not state is marked as assumed. Memory traffic is
counted: for torchtitan's layer by running its operations on shapes only, for the others by hand.
"""

from dataclasses import dataclass

from dalle_ds.planning.decoder import Decoder
from dalle_ds.planning.machines import MACHINES

TOLERANCE = 0.30
"""Largest accepted error, relative to the measured tokens per second."""


@dataclass(frozen=True)
class Published:
    """A run, and the tokens per second and GPU that its authors measured."""

    name: str
    source: str
    run: Decoder
    tokens_per_second: float

    @property
    def error(self) -> float:
        """Relative error: estimate / measurement - 1."""
        return self.run.tokens_per_second() / self.tokens_per_second - 1


# Llama 3.1 8B under FSDP2, not compiled. "Op" checkpointing saves the output of every other product and recomputes the rest.
# The H100 of this source has 2.4 TB/s and 500 W, and by its footnote a peak between the SXM's 989 and the NVL's 835.
_TITAN_H100 = MACHINES["H100"].but(tflops=912).model_copy(update={"memory_gigabytes_per_second": 2400.0, "memory_gib": 96.0})
_LLAMA_8B = ((1, 1), (0.25, 1), (0.25, 1), (1, 1), (3.5, 1), (3.5, 1), (1, 3.5))


def _torchtitan(n_gpus: int, measured: float) -> Published:
    run = Decoder(
        machine=_TITAN_H100,
        n_gpus=n_gpus,
        shard=n_gpus,
        n_layers=32,
        d_model=4096,
        n_heads=32,
        vocab=128256,
        length=8192,
        micro_batch=2,
        n_micro_steps=1,
        matrices=_LLAMA_8B,
        element_bytes=624,
        recomputed=0.365,
    )
    name = f"torchtitan, Llama 3.1 8B, FSDP2, {n_gpus} H100"
    return Published(name, "torchtitan, benchmarks/llama3_h100_202412", run, measured)


# The table of Megatron-LM's README, release 0.8, states TFLOP/s per GPU by its own count. Assumed: micro-batches of 2 without
# tensor parallelism, else of 1; pipelines with 4 chunks per GPU; 96 bytes per element with fused norms, GELUs and additions.
def _megatron(
    name: str, d_model: int, n_heads: int, n_layers: int, tensor: int, pipeline: int, batch: int, tflops: float
) -> Published:
    micro_batch = 2 if tensor == 1 else 1
    run = Decoder(
        machine=MACHINES["H100"],
        n_gpus=48 * tensor * pipeline,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        vocab=131072,
        length=4096,
        micro_batch=micro_batch,
        n_micro_steps=batch // 48 // micro_batch,
        element_bytes=96,
        tensor=tensor,
        is_sequence_parallel=True,
        pipeline=pipeline,
        chunks=4,
        exchange_bytes=6,
    )
    measured = tflops * 1e12 / run.flops_per_token
    return Published(f"Megatron-LM, {name}, {run.n_gpus} H100", "Megatron-LM, README, weak scaling", run, measured)


# 150,000 updates of 1,538 x 2,048 tokens in 1,830 hours: 92 TFLOP/s per GPU at 6 FLOPs per parameter and token. Attention and
# MLP of a layer are parallel: one all-reduce in the forward pass, one in its recomputation, one in the backward pass. Softmax
# and bias-GELU are fused, rotary embeddings and copies are not.
_NEOX = Decoder(
    machine=MACHINES["A100-40"].but(node_gbps=800),
    n_gpus=96,
    n_layers=44,
    d_model=6144,
    n_heads=64,
    vocab=50432,
    length=2048,
    micro_batch=4,
    n_micro_steps=32,
    element_bytes=250,
    recomputed=1.0,
    is_attention_fused=False,
    tensor=2,
    tensor_messages=6,
    pipeline=4,
    exchange_bytes=4,
)

PUBLISHED: tuple[Published, ...] = (
    _torchtitan(8, 5762),
    _torchtitan(128, 5605),
    Published(
        "GPT-NeoX-20B, 96 A100-40",
        "Black et al. 2022 (arXiv 2204.06745) and its configs/20B.yml",
        _NEOX,
        150_000 * 1538 * 2048 / (1830 * 3600 * 96),
    ),
    _megatron("1.7B", 2048, 16, 24, 1, 1, 192, 408.8),
    _megatron("7.1B", 4096, 32, 30, 2, 1, 192, 465.9),
    _megatron("16B", 6144, 48, 32, 4, 1, 192, 489.1),
    _megatron("32B", 7168, 56, 48, 8, 1, 192, 459.6),
    _megatron("70B", 8192, 64, 84, 8, 2, 384, 419.7),
    _megatron("119B", 10240, 80, 92, 8, 4, 768, 420.5),
    _megatron("177B", 12288, 96, 96, 8, 6, 1152, 432.8),
    _megatron("314B", 16384, 128, 96, 8, 8, 1536, 474.4),
    _megatron("462B", 18432, 144, 112, 8, 16, 3072, 459.9),
)
