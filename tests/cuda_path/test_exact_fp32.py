"""Every code path to a GPU switches TF32 and 16-bit sums off first. The switches also exist on a CPU.

tests/distributed/cases/replicas.py tests the code path of joining a job.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dalle_ds.bench.harness.machine import machine_for
from dalle_ds.bench.harness.settings import MachineBenchConfig
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.ops.exactness import exact_fp32, has_tf32
from dalle_ds.pretrained.clip import Clip
from dalle_ds.sampling.export import load_export
from dalle_ds.training.run import open_run
from preprocessing.encoding.encoder import encoder_of
from tests.sampling.exports import make_export
from tests.support.clip_models import make_clip

SMALL = DVAEConfig(image_size=16, n_groups=2, n_blk_per_group=1, n_hid=8, n_init=8, n_codes=16)


@pytest.fixture(autouse=True)
def torchs_own_flags() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    assert has_tf32()
    yield
    exact_fp32()


def require_exact() -> None:
    assert not has_tf32()
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_training_runs(tmp_path: Path) -> None:
    with open_run(tmp_path):
        require_exact()


def test_benchmarks() -> None:
    with machine_for(MachineBenchConfig()):
        require_exact()


def test_sampling_evaluating_and_the_registered_model(tmp_path: Path) -> None:
    load_export(make_export(tmp_path, n_samples=8, n_validation=4))
    require_exact()


def test_clip(tmp_path: Path) -> None:
    Clip.load(make_clip(tmp_path))
    require_exact()


@pytest.mark.parametrize("with_tf32", [False, True])
def test_encoding_has_tf32_only_where_and_while_it_is_asked_for(with_tf32: bool) -> None:
    dvae = DVAE(SMALL)
    seen: list[bool] = []
    dvae.encoder.register_forward_pre_hook(lambda *_: seen.append(has_tf32()))
    encode = encoder_of(dvae, "fp32", "cpu", with_tf32)
    require_exact()
    encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8).numpy())
    assert seen == [with_tf32]
    require_exact()
