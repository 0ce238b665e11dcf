"""What can be chosen in each benchmark: the one home of its options and their defaults."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dalle_ds.recipes import Config

Dtype = Literal["fp32", "bf16", "fp16"]
PRECISION = "fp32, bf16 (autocast) or fp16 (fp16 branches)."


def _numbers(value: Any) -> Any:
    return str(value).split(",") if isinstance(value, str | int) else value


class MachineBenchConfig(Config):
    """Where it runs."""

    threads: int = Field(1, ge=1, description="CPU threads. The clock is CPU time at 1, else the wall clock.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1.")


class CommonBenchConfig(MachineBenchConfig):
    """Options of every benchmark that takes turns."""

    rounds: int = Field(5, ge=1, description="Turns of each side.")


class GeometryBenchConfig(CommonBenchConfig):
    """Options of every benchmark that has a sequence: the defaults are the paper's."""

    text_len: int = Field(256, ge=2, description="Text slots.")
    grid: int = Field(32, ge=1, description="Image tokens a side.")
    conv_kernel: int = Field(11, ge=1, description="Window of the last layer, odd.")
    d_head: int = Field(64, ge=1, description="Width of a head.")

    @model_validator(mode="after")
    def _check(self) -> "GeometryBenchConfig":
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is {self.conv_kernel}, expected an odd number: the window is centred")
        return self

    @property
    def n_slots(self) -> int:
        return self.text_len + self.grid**2


class AttentionBenchConfig(GeometryBenchConfig):
    """Attention alone."""

    module: ClassVar = "dalle_ds.bench.attention"
    batch: int = Field(2, ge=1, description="Sequences at once.")
    heads: int = Field(8, ge=1, description="Heads.")
    dtype: Dtype = Field("fp32", description="Of queries, keys and values: fp32, bf16, fp16.")
    backend: str = Field("auto", description="Ours: auto, structured, flex, math.")
    mix_layers: int = Field(64, ge=1, description="Depth of the model whose mix of patterns is summed up.")


class ResblockBenchConfig(GeometryBenchConfig):
    """One layer: attention and MLP."""

    module: ClassVar = "dalle_ds.bench.resblock"
    batch: int = Field(2, ge=1, description="Sequences at once.")
    heads: int = Field(8, ge=1, description="Heads; the model is heads * d_head wide.")
    dtype: Dtype = Field("fp32", description=PRECISION)
    mix_layers: int = Field(64, ge=1, description="Depth of the model whose mix of patterns is summed up.")


class PriorBenchConfig(GeometryBenchConfig):
    """A whole prior."""

    vocab_size: int = Field(16384, ge=1, description="Text tokens.")
    n_codes: int = Field(8192, ge=2, description="Image tokens.")


class TrainingBenchConfig(PriorBenchConfig):
    """A training step of a whole prior."""

    layers: int | None = Field(None, ge=1, description="Layers; unset: 12, on a GPU 2.")
    heads: int | None = Field(None, ge=1, description="Heads; unset: 8, on a GPU the 32 of preset 1.2b.")
    batch: int = Field(2, ge=1, description="Samples of a step.")
    rounds: int = Field(3, ge=1, description="Turns of each side.")


class StepBenchConfig(TrainingBenchConfig):
    """The step with two kinds of attention."""

    module: ClassVar = "dalle_ds.bench.step"
    dtype: Dtype = Field("fp32", description=PRECISION)
    peak_tflops: float | None = Field(None, gt=0, description="Peak of the device in this precision, for MFU.")


class ScalingBenchConfig(TrainingBenchConfig):
    """The fp16 step with two kinds of gradient scaling."""

    module: ClassVar = "dalle_ds.bench.scaling"
    rounds: int = Field(9, ge=1, description="Turns of each side.")


class UnderflowBenchConfig(MachineBenchConfig):
    """A small prior whose layers have gradients of very different size."""

    module: ClassVar = "dalle_ds.bench.underflow"
    layers: int = Field(16, ge=2, description="Layers.")
    powers: int = Field(4, ge=0, description="Each layer's gradients are 2^-powers of the layer's before; 0: a plain prior.")
    heads: int = Field(2, ge=1, description="Heads, 32 wide.")
    updates: int = Field(300, ge=1, description="Of each of the three runs.")
    learning_rate: float = Field(5e-4, gt=0, description="The highest; warm-up, then a half-cosine.")
    samples: int = Field(64, ge=16, description="Random samples to learn by heart, 16 of them an update.")
    chart: str = Field("underflow.png", description="File for the chart.")


class SamplingBenchConfig(PriorBenchConfig):
    """Drawing image tokens one by one."""

    heads: int = Field(8, ge=1, description="Heads.")
    positions: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field(
        (8, 128, 256, 512, 768, 1000), description="Image tokens at which both sides are timed, rising, with commas."
    )

    @field_validator("positions")
    @classmethod
    def _fit(cls, positions: tuple[int, ...], others: ValidationInfo) -> tuple[int, ...]:
        if not {"grid", "rounds"} <= others.data.keys():
            return positions  # those have errors of their own
        last = (
            others.data["grid"] ** 2 - 1 - (2 * others.data["rounds"] + 4)
        )  # drawn there: warm-up and turns around two others
        if not positions or list(positions) != sorted(set(positions)) or positions[0] < 0 or positions[-1] > last:
            raise ValueError(f"expected rising ones from 0 to {last} on this grid and with {others.data['rounds']} rounds")
        return positions


class SampleBenchConfig(SamplingBenchConfig):
    """Sampling with ours, with a dense cache, with none."""

    module: ClassVar = "dalle_ds.bench.sample"
    layers: int = Field(12, ge=1, description="Layers.")
    batch: int = Field(16, ge=1, description="Images at once: candidates of one caption, then one each of many captions.")
    rounds: int = Field(3, ge=1, description="Turns of each side.")
    uncached: bool = Field(True, description="Time also the way without any cache, one round (slow).")


class PeersBenchConfig(SamplingBenchConfig):
    """Another project's training step and sampling."""

    module: ClassVar = "dalle_ds.bench.peers"
    layers: int = Field(4, ge=1, description="Layers.")
    batch: int = Field(2, ge=1, description="Samples of a training step.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Of the training step: fp32, or bf16 (autocast, both sides).")
    images: int = Field(16, ge=1, description="Images sampled at once, of one caption.")
    rounds: int = Field(2, ge=1, description="Turns of each side.")
    positions: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field(
        (8, 512, 1000), description="Image tokens at which both sides are timed, rising, with commas."
    )


class EncodeBenchConfig(CommonBenchConfig):
    """The encode stage of preprocessing."""

    module: ClassVar = "preprocessing.bench"
    threads: int = Field(1, ge=1, description="CPU threads of the encoder; images are decoded on the other cores.")
    raw: str | None = Field(None, description="Root of raw shards, of which the first is taken; unset: JPEGs are made.")
    dvae: str | None = Field(None, description="dvae.safetensors; unset: random weights, full size or --small.")
    small: bool = Field(False, description="The dVAE of the demo: 32 px, 64 codes of 512.")
    images: int | None = Field(None, ge=2, description="Images a turn; unset: 8, with --small 4096.")
    batch: int | None = Field(None, ge=1, description="Images of a batch; unset: 2, with --small 64.")
    side: int | None = Field(None, ge=16, description="Width of the JPEGs made; unset: 1.5 times the dVAE's.")
    precision: Dtype = Field("fp32", description="fp32, bf16 or fp16, as encode.precision.")


class LoaderBenchConfig(CommonBenchConfig):
    """Reading token shards."""

    module: ClassVar = "dalle_ds.bench.loader"
    dataset: str | None = Field(None, description="Root of a token data set on this machine; unset: a random one is made.")
    samples: int = Field(8192, ge=256, description="Samples of the random one, 1024 codes each; a turn reads all.")
    text_len: int = Field(256, ge=2, description="Text slots.")
    batch: int = Field(64, ge=1, description="Samples of a batch.")
    bpe_dropout: float = Field(0.1, ge=0, lt=1, description="Of our second row: webdataset has none.")
    pace: float = Field(720.0, gt=0, description="Samples a second that a training loop consumes: ten times the demo's.")


class CudaPathBenchConfig(Config):
    """What a GPU would be given to do, and what the host does for it; no GPU and no tensor of that size is needed."""

    module: ClassVar = "dalle_ds.bench.cuda_path"
    heads: Annotated[tuple[int, ...], BeforeValidator(_numbers)] = Field(
        (32, 62), min_length=1, description="Heads of 64 of each model, with commas: presets 1.2b and 12b."
    )
    deepspeed_config: str = Field("ds_configs/zero3_fp16.json", description="DeepSpeed JSON with ZeRO-3, fp16 per resblock.")
    world_size: int = Field(8, ge=2, description="Ranks, of which this process plays one.")
    rounds: int = Field(5, ge=0, description="Turns of engine and plain model for the host's time; 0: counts alone.")
