"""What the prior's step does beside its matrix products, counted without a GPU: what estimates of time and memory rest on."""

from dataclasses import dataclass

from dalle_ds.planning.timing import Format


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one layer under ZeRO-3 with fp16 branches and a gradient scale per residual block. An element is one number of the
    residual stream, (batch, slots, width); a parameter is one of the whole layer's, however it is sharded."""

    element_bytes: float
    """Memory traffic of an element in forward and backward pass, beside products and attention."""
    recomputed_bytes: float
    """The same of a second forward pass, where the layer is recomputed."""
    weight_bytes: float
    """Memory traffic of a parameter in a micro-step, on the stream of the products: read by three or four of them, its gradient
    written."""
    gather_bytes: float
    """On other streams: its 16-bit copy received, twice; of a shard on one of many GPUs next to nothing."""
    alone_bytes: float
    """Instead of that on one GPU, which has the whole shard: rounded to 16 bits, twice."""
    reduce_bytes: float
    """On other streams: its gradient divided and scattered."""
    collectives: float
    """Messages in a micro-step."""
    host_ms: float
    """CPU time of a micro-step, on one core."""
    host_ms_per_rank: float
    """And for each further GPU that shards it: DeepSpeed loops over all of them, in Python, for every tensor."""
    update_host_ms: float
    """CPU time of an update's end: norm, clipping, step, small parameters gathered again."""
    heads: Format
    """Of the unembeddings' products."""
    products_a_head_product: int
    """Of 16 bits, summed to what is as exact as one in fp32."""
    kept_bytes: float
    """Memory that an element takes from forward to backward pass in a layer that is not recomputed."""
    working_bytes: float
    """Memory that an element takes beside, in the layer whose backward pass is under way."""
    gathered_bytes: float
    """Memory of a parameter while the layer is gathered."""


NOW = Counts(
    element_bytes=166,
    recomputed_bytes=50,
    weight_bytes=9.3,
    gather_bytes=4,
    alone_bytes=12,
    reduce_bytes=14,
    collectives=13,
    host_ms=4.9,
    host_ms_per_rank=0.069,
    update_host_ms=2.1,
    heads="half",
    products_a_head_product=3,
    kept_bytes=36,
    working_bytes=14,
    gathered_bytes=2,
)
"""Counted at d 2048 and 3968: traffic and memory over fake CUDA tensors, messages and `host_ms_per_rank` as one rank of a fake
world (`dalle-ds bench cuda-path`). `host_ms` and `update_host_ms` are half of what was measured there, 9.8 and 4.3 ms on a
shared core of an AMD EPYC, operators' own work on small tensors included: a GPU node's cores are taken for twice as fast."""

INPUT_BYTES = 4.0
"""Memory that an element takes from forward to backward pass in a layer that is recomputed."""

LOGIT_BYTES, HEAD_WEIGHT_BYTES = 84.0, 36.0
"""Memory traffic of the loss for each logit, and in each chunk of logits for each weight of an unembedding: operation by
operation in `dalle_ds.ops.cross_entropy`, where three products are summed."""

HEAD_MEMORY_BYTES = 8.0
"""Memory of an unembedding's weight while its losses are made: itself, gathered, and as two fp16 parts."""

HEAD_ROW_BYTES = 8.0
"""And of a value of its gradient that is being made: two fp32 summands."""

STEP_BYTES = 48.0
"""Memory traffic of the step for a parameter of the shard, its moments left out: fp32 weight read and written; gradient
un-scaled, measured, flattened, clipped and read."""

ACCUMULATED_BYTES = 12.0
"""Memory traffic for a parameter of the shard in a micro-step: gradient added to those before."""

MEAN_TEXT_TOKENS = 40
"""Text tokens of a sample that are no pads: only these reach the text unembedding. Captions of the web have 10 to 60."""
