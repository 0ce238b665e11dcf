"""Options of each benchmark and their defaults."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dalle_ds.recipes import DEVICE, Config, OptionalPlace, OutFile

Dtype = Literal["fp32", "bf16", "fp16"]
PRECISION = "fp32, bf16 (autocast) or fp16 (fp16 branches)"


def _words(value: Any) -> Any:
    return str(value).split(",") if isinstance(value, str | int) else value


class MachineBenchConfig(Config):
    """Options of every benchmark that runs on a device: device and threads."""

    threads: int = Field(1, ge=1, description="CPU threads; with 1 the clock is CPU time, with more the wall clock")
    device: str = Field("auto", description=DEVICE)


class CommonBenchConfig(MachineBenchConfig):
    """Options of every benchmark that times its sides in turns."""

    rounds: int = Field(5, ge=1, description="timed runs of each side")


class SequenceBenchConfig(CommonBenchConfig):
    """Options of every benchmark of token sequences. The defaults are the paper's."""

    text_len: int = Field(256, ge=2, description="text slots")
    conv_kernel: int = Field(11, ge=1, description="side of the last layer's attention window, odd")
    d_head: int = Field(64, ge=1, description="width of a head")

    @model_validator(mode="after")
    def _check(self) -> "SequenceBenchConfig":
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is {self.conv_kernel}, expected an odd number: the window is centred")
        return self


class GeometryBenchConfig(SequenceBenchConfig):
    """Options of every benchmark of sequences of one length."""

    grid: int = Field(32, ge=1, description="image tokens per side of the grid")

    @property
    def n_slots(self) -> int:
        return self.text_len + self.grid**2


class AttentionBenchConfig(GeometryBenchConfig):
    """Options of the benchmark of attention alone."""

    module: ClassVar = "dalle_ds.bench.attention"
    section: ClassVar = "bench_attention"
    batch: int = Field(2, ge=1, description="sequences per batch")
    n_heads: int = Field(8, ge=1, description="attention heads")
    dtype: Dtype = Field("fp32", description="dtype of queries, keys and values: fp32, bf16 or fp16")
    backend: str = Field("auto", description="our attention backend: auto, structured, flex or math")
    mix_layers: int = Field(64, ge=1, description="layers of the model whose pattern mix is summed up")


class ResblockBenchConfig(GeometryBenchConfig):
    """Options of the benchmark of one layer (attention and MLP)."""

    module: ClassVar = "dalle_ds.bench.resblock"
    section: ClassVar = "bench_resblock"
    batch: int = Field(2, ge=1, description="sequences per batch")
    n_heads: int = Field(8, ge=1, description="attention heads; the model width is n_heads * d_head")
    dtype: Dtype = Field("fp32", description=PRECISION)
    mix_layers: int = Field(64, ge=1, description="layers of the model whose pattern mix is summed up")


class VocabularyBenchConfig(Config):
    """Sizes of the vocabularies."""

    vocab_size: int = Field(16384, ge=1, description="size of the text vocabulary")
    n_codes: int = Field(8192, ge=2, description="size of the image codebook")


class PriorBenchConfig(VocabularyBenchConfig, GeometryBenchConfig):
    """Options of every benchmark of a whole prior."""


class TrainingBenchConfig(PriorBenchConfig):
    """Options of every benchmark of a training step."""

    n_layers: int | None = Field(None, ge=1, description="layers; unset: 12, on a GPU 2")
    n_heads: int | None = Field(None, ge=1, description="attention heads; unset: 8, on a GPU 32 as in preset 1.2b")
    batch: int = Field(2, ge=1, description="samples per step")
    rounds: int = Field(3, ge=1, description="timed runs of each side")


class StepBenchConfig(TrainingBenchConfig):
    """Options of the benchmark of a training step, with our attention and with dense attention."""

    module: ClassVar = "dalle_ds.bench.step"
    section: ClassVar = "bench_step"
    dtype: Dtype = Field("fp32", description=PRECISION)
    peak_tflops: float | None = Field(None, gt=0, description="peak TFLOP/s of the device in this precision, for MFU")


class ScalingBenchConfig(TrainingBenchConfig):
    """Options of the benchmark of the fp16 step with two kinds of gradient scaling."""

    module: ClassVar = "dalle_ds.bench.scaling"
    section: ClassVar = "bench_scaling"
    rounds: int = Field(9, ge=1, description="timed runs of each side")


class UnderflowBenchConfig(MachineBenchConfig):
    """Options of the constructed case: a small prior whose layers have gradients of very different sizes."""

    module: ClassVar = "dalle_ds.bench.underflow"
    section: ClassVar = "bench_underflow"
    n_layers: int = Field(16, ge=2, description="layers")
    powers: int = Field(4, ge=0, description="gradients shrink by a factor 2^powers from layer to layer; 0: plain prior")
    n_heads: int = Field(2, ge=1, description="attention heads of width 32")
    updates: int = Field(300, ge=1, description="updates of each of the three runs")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate; the schedule is warm-up, then a half-cosine")
    samples: int = Field(64, ge=16, description="random samples to memorise, 16 per update")
    chart: OutFile = Field("underflow.png", description="output file for the chart")


class SamplingBenchConfig(PriorBenchConfig):
    """Options of every benchmark that samples image tokens one by one."""

    n_heads: int = Field(8, ge=1, description="attention heads")
    positions: Annotated[tuple[int, ...], BeforeValidator(_words)] = Field(
        (8, 128, 256, 512, 768, 1000), description="image positions to time, increasing, separated by commas"
    )

    @field_validator("positions")
    @classmethod
    def _fit(cls, positions: tuple[int, ...], others: ValidationInfo) -> tuple[int, ...]:
        if not {"grid", "rounds"} <= others.data.keys():
            return positions  # an invalid grid or rounds has its own error
        last = (
            others.data["grid"] ** 2 - 1 - (2 * others.data["rounds"] + 4)
        )  # tokens sampled from each position: warm-up, and the baseline's runs around two other sides
        if not positions or list(positions) != sorted(set(positions)) or positions[0] < 0 or positions[-1] > last:
            raise ValueError(f"expected increasing positions from 0 to {last} for this grid and {others.data['rounds']} rounds")
        return positions


class SampleBenchConfig(SamplingBenchConfig):
    """Options of the benchmark of sampling with our cache, with a dense cache and without a cache."""

    module: ClassVar = "dalle_ds.bench.sample"
    section: ClassVar = "bench_sample"
    n_layers: int = Field(12, ge=1, description="layers")
    batch: int = Field(16, ge=1, description="images per batch: candidates of one caption, then one image per caption")
    rounds: int = Field(3, ge=1, description="timed runs of each side")
    uncached: bool = Field(True, description="also time one round of sampling without a cache (slow)")


class PeersBenchConfig(VocabularyBenchConfig, SequenceBenchConfig):
    """Options of the comparison with other packages: training step and sampling, at several grids."""

    module: ClassVar = "dalle_ds.bench.peers"
    section: ClassVar = "bench_peers"
    peers: Annotated[tuple[Literal["dalle-pytorch", "gpt2"], ...], BeforeValidator(_words)] = Field(
        ("dalle-pytorch", "gpt2"),
        min_length=1,
        description="packages to compare with, separated by commas: dalle-pytorch, gpt2",
    )
    grids: Annotated[tuple[Annotated[int, Field(ge=2)], ...], BeforeValidator(_words)] = Field(
        (16, 20, 24, 32), min_length=1, description="image tokens per side of each grid, separated by commas"
    )
    n_layers: int = Field(4, ge=1, description="layers")
    n_heads: int = Field(8, ge=1, description="attention heads")
    batch: int = Field(2, ge=1, description="samples per training step")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="training step in fp32, or in bf16 (autocast on all sides)")
    images: int = Field(16, ge=1, description="images of one caption per batch of sampling")
    rounds: int = Field(2, ge=1, description="timed runs of each side")
    sampling: bool = Field(True, description="also compare sampling, which takes most of the time")

    def prior_of(self, grid: int) -> PriorBenchConfig:
        """Size of the prior at one grid."""
        shared = {name: getattr(self, name) for name in PriorBenchConfig.model_fields if name != "grid"}
        return PriorBenchConfig(grid=grid, **shared)


class EncodeBenchConfig(CommonBenchConfig):
    """Options of the benchmark of preprocessing's encode stage."""

    module: ClassVar = "preprocessing.bench"
    section: ClassVar = "bench_encode"
    threads: int = Field(1, ge=1, description="CPU threads of the encoder; images are decoded on the other cores")
    raw: OptionalPlace = Field(None, description="root of raw shards; the first shard is used. If unset, JPEGs are generated")
    dvae: OptionalPlace = Field(None, description="dvae.safetensors; unset: random weights of full size or --small")
    small: bool = Field(False, description="use the demo's dVAE: 32 px, 64 tokens per image, codebook of 512")
    images: int | None = Field(None, ge=2, description="images per run; unset: 8, with --small 4096")
    batch: int | None = Field(None, ge=1, description="images per batch; unset: 2, with --small 64")
    side: int | None = Field(None, ge=16, description="width of generated JPEGs in pixels; unset: 1.5 times the dVAE's")
    precision: Dtype = Field("fp32", description="fp32, bf16 or fp16, as in encode.precision")


class LoaderBenchConfig(CommonBenchConfig):
    """Options of the benchmark of reading token shards."""

    module: ClassVar = "dalle_ds.bench.loader"
    section: ClassVar = "bench_loader"
    data: OptionalPlace = Field(None, description="root of a local token data set; unset: a random one is generated")
    samples: int = Field(8192, ge=256, description="samples of the random data set, 1024 codes each; a run reads all")
    text_len: int = Field(256, ge=2, description="text slots")
    batch: int = Field(64, ge=1, description="samples per batch")
    bpe_dropout: float = Field(0.1, ge=0, lt=1, description="BPE dropout of our second row; webdataset has none")
    pace: float = Field(720.0, gt=0, description="samples/s that a training loop consumes; default: ten times the demo's")


class CudaPathBenchConfig(Config):
    """Options of the count of GPU work and host work. It needs no GPU and no memory for tensors of that size."""

    module: ClassVar = "dalle_ds.bench.cuda_path"
    section: ClassVar = "bench_cuda_path"
    n_heads: Annotated[tuple[int, ...], BeforeValidator(_words)] = Field(
        (32, 62), min_length=1, description="heads (64 wide) of each model, separated by commas; default: presets 1.2b, 12b"
    )
    deepspeed_config: str = Field("ds_configs/zero3_fp16.json", description="DeepSpeed JSON: ZeRO-3, fp16 per resblock")
    world_size: int = Field(8, ge=2, description="number of ranks; this process is one of them")
    rounds: int = Field(5, ge=0, description="timed runs of engine and plain model for the host's time; 0: counts only")
