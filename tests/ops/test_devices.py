"""Choice of the device and of the number of ranks, on simulated machines with GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_ds.bench.harness.machine import machine_for
from dalle_ds.bench.harness.settings import MachineBenchConfig
from dalle_ds.ops.devices import default_device, resolve_device
from preprocessing.configs import EncodeConfig
from preprocessing.stages.encode import _device
from tests.support import launching


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_deepspeeds_accelerator_decides_where_auto_is(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    encode = EncodeConfig(raw="raw", dvae="d", tokenizer="t", out="o")
    with machine_for(MachineBenchConfig()) as machine:
        assert {default_device(), _device(encode)} == {"cpu"}
        assert {resolve_device("auto"), machine.device} == {torch.device("cpu")}
    for value in ("cuda", None):
        monkeypatch.delenv("DS_ACCELERATOR") if value is None else monkeypatch.setenv("DS_ACCELERATOR", value)
        assert {default_device(), _device(encode), resolve_device("auto").type} == {"cuda"}


RANK_ON_A_GPU_MACHINE = """
import torch
torch.cuda.is_available = lambda: True
from dalle_ds.parallel.ranks import join, leave
ranks = join()
import deepspeed
print(ranks.device, deepspeed.accelerator.get_accelerator().device_name(), torch.distributed.get_backend())
leave()
"""


@pytest.mark.launch
def test_a_rank_is_where_deepspeed_has_the_model(tmp_path: Path) -> None:
    done = launching.run([sys.executable, "-c", RANK_ON_A_GPU_MACHINE], tmp_path)
    assert done.stdout.split() == ["cpu", "cpu", "gloo"], done.stderr[-2000:]


def test_launched_tests_see_no_gpu() -> None:
    assert launching.environment()["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("n_gpus", "accelerator", "ranks"), [(1, None, 1), (2, "cuda", 2), (8, None, 2), (0, None, 2), (8, "cpu", 2)]
)
def test_a_machine_takes_a_rank_for_each_gpu_and_two_without(
    tmp_path: Path, n_gpus: int, accelerator: str | None, ranks: int
) -> None:
    """Number of ranks from launchers/ranks.sh, which the demo and the pages use. A fake torch module reports the GPUs."""
    there = f"class cuda:\n    is_available = lambda: {n_gpus > 0}\n    device_count = lambda: {n_gpus}\n"
    (tmp_path / "torch.py").write_text(there + "Tensor = device = dtype = None\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("DS_ACCELERATOR", None)
    if accelerator:
        env["DS_ACCELERATOR"] = accelerator
    script = launching.ROOT / "launchers" / "ranks.sh"
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ranks}\n"
    wrong = subprocess.run(["bash", script, "abc"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: abc: expected the largest number of ranks, such as 2\n"
    assert subprocess.run(["bash", script, "--help"], capture_output=True, text=True).stdout.startswith("Print how many ranks")


def test_the_demo_asks() -> None:
    assert '--num_gpus "$(bash launchers/ranks.sh 2)"' in (launching.ROOT / "launchers" / "demo.sh").read_text()
