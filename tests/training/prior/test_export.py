"""Export: the same for any number of files, in memory for two tensors, and checked against the engine's losses."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError, FingerprintMismatch
from dalle_ds.models.prior import Prior
from dalle_ds.precision import fp16_branches
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.sampling.export import load_export
from dalle_ds.storage.fingerprint import fingerprint
from dalle_ds.storage.weights import open_weights, write_weights
from dalle_ds.training.prior.export import export_checkpoint
from dalle_ds.training.prior.parity import prove_parity, weights_from_files
from tests.support.sealed import edit_json
from tests.training.prior.checkpoints import make_checkpoint

CHECKPOINT = Path("run", "checkpoints", "update_00000007")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, and the prior in its checkpoint. The sizes are odd, so that ZeRO shards are padded."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, make_checkpoint(folder)


def same_weights(export: Path, prior: Prior) -> bool:
    found, expected = load_export(export).prior.state_dict(), prior.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ema", [True, False])
def test_export_holds_the_weights(made, tmp_path, ema):
    folder, prior = made
    summary = export_checkpoint(folder / "run", tmp_path, ema=ema)
    config = {"kind": "prior", "config": prior.config.model_dump()}
    assert summary["fingerprint"] == fingerprint(config, prior.state_dict()), "equals the fingerprint of the weights in memory"
    assert same_weights(tmp_path, prior)
    info = json.loads((tmp_path / "config.json").read_text())
    assert (info["fingerprint"], info["update"], info["ema"]) == (summary["fingerprint"], 7, ema)
    assert info["data_urls"] == [str(folder / "tokens"), "s3://second/tokens"]
    assert summary["peak_memory_gigabytes"] > 0.01
    assert json.loads((tmp_path / "parity.json").read_text()) == summary["parity"]
    if ema:
        assert summary["parity"]["tokens"] == 4 * 16 and summary["parity"]["max_difference_same_format"] == 0.0
        assert 0 < summary["parity"]["max_difference_fp32"] < 1e-2


@pytest.mark.parametrize("out", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_several_files_are_the_same_model(made, tmp_path, request, out):
    folder, prior = made
    url = str(tmp_path / "export") if out == "local" else request.getfixturevalue("s3").url
    whole = export_checkpoint(folder / "run", tmp_path / "whole")
    parts = export_checkpoint(folder / "run", url, max_file_bytes=10_000)
    assert {**parts, "export": 0, "peak_memory_gigabytes": 0} == {**whole, "export": 0, "peak_memory_gigabytes": 0}
    assert same_weights(url, prior)
    if out == "local":
        index = json.loads(Path(url, "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in prior.parameters())
        files = sorted(set(index["weight_map"].values()))
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
        for file in files:
            tensors = load_file(Path(url, file))  # with the safetensors library
            assert tensors.keys() == {name for name, where in index["weight_map"].items() if where == file}
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
    # a folder holds one model: files of an earlier export are deleted
    export_checkpoint(folder / "run", url)
    if out == "local":
        assert [file.name for file in Path(url).glob("model*")] == ["model.safetensors"]
    export_checkpoint(folder / "run", url, max_file_bytes=20_000)
    if out == "local":
        files = {file.name for file in Path(url).glob("model*")}
        index = json.loads(Path(url, "model.safetensors.index.json").read_text())
        assert files == {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert same_weights(url, prior)


def test_an_export_carries_the_sampling_settings_of_the_run(made, tmp_path):
    folder, _ = made
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoint = tmp_path / CHECKPOINT / "checkpoint.json"

    def sampling(**named):
        summary = export_checkpoint(tmp_path / "run", tmp_path / "export", **named)
        found = json.loads((tmp_path / "export" / "config.json").read_text())["sampling"]
        assert found.items() <= summary.items()
        return found

    assert sampling() == {"temperature": 1.0, "guidance": 1.0}, "of a checkpoint of an earlier version"
    edit_json(checkpoint, lambda tree: tree["about"].update(sampling={"temperature": 0.45, "guidance": 1.5}))
    assert sampling() == {"temperature": 0.45, "guidance": 1.5}
    assert sampling(temperature=0.8) == {"temperature": 0.8, "guidance": 1.5}
    edit_json(checkpoint, lambda tree: tree["about"].update(caption_dropout=0.0))
    with pytest.raises(ConfigError, match="guidance 1.5 requires .* was trained with data.caption_dropout 0; export it with"):
        sampling()
    assert sampling(guidance=1.0) == {"temperature": 0.45, "guidance": 1.0}


# ---- parity check ----


def test_losses_from_files_are_those_of_the_model_in_memory(made, tmp_path):
    folder, prior = made
    write_weights(tmp_path / "w", kind="prior", config={}, state=prior.state_dict())
    tensors = open_weights(tmp_path / "w", "prior").tensors
    batch = load_file(folder / CHECKPOINT / "attempt" / "parity.safetensors")
    for fp16, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.float16), (False, torch.bfloat16)):
        plain = Prior(prior.config).to(dtype)
        plain.load_state_dict(prior.state_dict())
        with torch.device("meta"):
            streamed = Prior(prior.config)
        if fp16:
            use_fp16_branches(plain)
            use_fp16_branches(streamed)
        most = 0

        def count(n_bytes: int, model: Prior = streamed) -> None:
            nonlocal most
            most = max(most, sum(p.nbytes for p in model.parameters() if p.device.type == "cpu"))

        with torch.no_grad(), weights_from_files(streamed, tensors, fp16, count, dtype):
            found = streamed.image_nll(batch["text"], batch["image"])
            expected = plain.image_nll(batch["text"], batch["image"])
        assert torch.equal(found, expected)
        assert 0 < most < 2 * max(tensor.nbytes for tensor in tensors.values())
        assert all(parameter.device.type == "meta" for parameter in streamed.parameters())


def as_a_gpu_does(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer that rounds the product before and after adding the bias, and sums it in two parts."""
    half_width = x.shape[-1] // 2
    rows, columns = x.float(), weight.half().float().t()
    product = (rows[..., half_width:] @ columns[half_width:] + rows[..., :half_width] @ columns[:half_width]).half()
    return product if bias is None else product + bias.half()


def test_an_engine_that_rounds_as_gpus_do_is_believed(made, tmp_path, monkeypatch):
    """Uses a model with sharp predictions: in an untrained model the losses hardly depend on the branches."""
    folder, prior = made
    sharp = Prior(prior.config)
    sharp.load_state_dict({name: 256 * w if name.startswith("heads.") else w for name, w in prior.state_dict().items()})
    write_weights(tmp_path / "w", kind="prior", config={}, state=sharp.state_dict())
    tensors = open_weights(tmp_path / "w", "prior").tensors
    scored = load_file(folder / CHECKPOINT / "attempt" / "parity.safetensors")
    use_fp16_branches(sharp)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(fp16_branches, "linear_fp16", as_a_gpu_does)
        scored["image_nll"] = sharp.image_nll(scored["text"], scored["image"])
    save_file(scored, tmp_path / "parity.safetensors")
    proof = prove_parity(tmp_path, prior.config, tensors, fp16_branches=True)
    assert proof["max_difference_same_format"] > 1e-3, "above the limit for fp32"
    assert 0 < proof["mean_difference_same_format"] < 2e-3


def test_weights_of_another_update_are_no_export(made, tmp_path):
    """Weights with a relative noise of 2% must fail the check."""
    folder, prior = made
    sharp = Prior(prior.config)
    sharp.load_state_dict({name: 8 * w if name.startswith("heads.") else w for name, w in prior.state_dict().items()})
    scored = load_file(folder / CHECKPOINT / "attempt" / "parity.safetensors")
    with torch.no_grad():
        scored["image_nll"] = sharp.image_nll(scored["text"], scored["image"])
    generator = torch.Generator().manual_seed(0)
    moved = {name: w * (1 + 0.02 * torch.randn(w.shape, generator=generator)) for name, w in sharp.state_dict().items()}
    write_weights(tmp_path / "w", kind="prior", config={}, state=moved)
    save_file(scored, tmp_path / "parity.safetensors")
    with pytest.raises(DataError, match="in the mean"):
        prove_parity(tmp_path, prior.config, open_weights(tmp_path / "w", "prior").tensors, fp16_branches=True)


def test_weights_that_give_other_losses_are_no_export(made, tmp_path, monkeypatch):
    folder, prior = made
    out = tmp_path / "out"
    export_checkpoint(folder / "run", out)
    scored = load_file(folder / CHECKPOINT / "attempt" / "parity.safetensors")
    tensors = open_weights(out / "model.safetensors", "prior").tensors
    engine = scored["image_nll"].clone()
    scored["image_nll"][1, 2] += 5e-2
    save_file(scored, tmp_path / "parity.safetensors")
    with pytest.raises(DataError, match="by 5.00e-02 nats on a token, expected at most 2e-02 with branches in float16"):
        prove_parity(tmp_path, prior.config, tensors, fp16_branches=True)
    save_file({**scored, "image_nll": engine + 1e-2}, tmp_path / "parity.safetensors")
    with pytest.raises(DataError, match="by 1.00e-02 nats in the mean, expected at most 2e-03 with branches in float16"):
        prove_parity(tmp_path, prior.config, tensors, fp16_branches=True)
    save_file({**scored, "image_nll": torch.full_like(engine, torch.inf)}, tmp_path / "parity.safetensors")
    with pytest.raises(DataError, match="by inf nats in the mean"):
        prove_parity(tmp_path, prior.config, tensors, fp16_branches=True)
    save_file({**scored, "image_nll": engine + 1e-2}, tmp_path / "parity.safetensors")
    with pytest.raises(DataError, match="in the mean, expected at most 1e-04 with branches in float32"):
        prove_parity(tmp_path, prior.config, tensors, fp16_branches=False)

    def fails(*args: object, **options: object) -> Mapping[str, object]:
        raise DataError("differs")

    monkeypatch.setattr("dalle_ds.training.prior.export.prove_parity", fails)
    with pytest.raises(DataError, match="differs"):
        export_checkpoint(folder / "run", out)
    with pytest.raises(DataError, match="not an export folder"):
        load_export(out)


# ---- refused checkpoints ----


def test_files_that_do_not_fit_are_named(made, tmp_path):
    def run(name: str) -> Path:
        copy = tmp_path / name / "checkpoints" / "update_00000007"
        shutil.copytree(made[0] / CHECKPOINT, copy)
        return copy / "attempt"

    def refused(checkpoint: Path, match: str, ema: bool = True) -> None:
        out = tmp_path / "out"
        with pytest.raises((DataError, FingerprintMismatch), match=match):
            export_checkpoint(checkpoint.parents[2], out, ema=ema)
        assert not out.exists() or not list(out.iterdir()), "nothing may be left of what is refused"

    copy = run("one rank's file is missing")
    (copy / "state-00001-of-00002.safetensors").unlink()
    refused(copy, "state-00001-of-00002.safetensors is missing")
    (copy / "state-00000-of-00002.safetensors").unlink()
    refused(copy, "state-0000[01]-of-00002.safetensors is missing", ema=False)

    copy = run("cut")
    file = copy / "state-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy, "state-00001-of-00002.safetensors has .* bytes, expected")

    copy = run("a flipped bit, of a weight's last digit")
    file = copy / "state-00001-of-00002.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-4] ^= 1
    file.write_bytes(whole)
    refused(copy, "state-00001-of-00002.safetensors has changed since it was written")

    for name, change, match in (
        (
            "wider",
            lambda about: about["model"].update(n_codes=99),
            "do not match the model.*heads.image.bias, heads.image.weight",
        ),
        ("tokenizer", lambda about: about.update(tokenizer="other"), "tokenizer.model of data set"),
        ("dvae", lambda about: about.update(dvae="other"), "dvae.safetensors of data set"),
    ):
        copy = run(name)
        edit_json(copy.parent / "checkpoint.json", lambda tree, change=change: change(tree["about"]))
        refused(copy, match)


# ---- memory ----

CONSTANT = 32 << 20
"""Bytes that an export may use in addition to two tensors: heap, dVAE, activations of the parity batch (few tokens here)."""

MEASURED = """
import json, re, sys
from pathlib import Path
from dalle_ds.sampling.export import load_export
from dalle_ds.training.prior.export import export_checkpoint

def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large = sys.argv[1], sys.argv[2]
export_checkpoint(small + "/run", small + "/warm")  # lazy imports happen here
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = resident("VmRSS")
export_checkpoint(large + "/run", large + "/export", max_file_bytes=int(sys.argv[3]))
grown = resident("VmHWM") - before
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
export = load_export(large + "/export")
print(json.dumps({"grown": grown, "grown_by_loading": resident("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux for resident memory")
def test_peak_memory_is_two_tensors_and_a_constant(made, tmp_path):
    """300 MB of weights, in a separate process. Resident pages of memory-mapped files count too."""
    prior = make_checkpoint(tmp_path, n_layers=24, n_heads=8, d_head=64)
    sizes = [parameter.nbytes for parameter in prior.parameters()]
    assert sum(sizes) > 300e6
    command = [sys.executable, "-c", MEASURED, made[0], tmp_path, 100_000_000]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        # glibc would raise this threshold, and the holes that temporary tensors leave in its heap would count: up to 100 MB
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    bound = 2 * max(sizes) + CONSTANT
    assert found["grown"] <= bound, f"{found} for {sum(sizes)} bytes of weights, expected at most {bound}"
    assert 0.9 * sum(sizes) < found["grown_by_loading"] <= sum(sizes) + bound, "the model once, not twice"
    assert re.search(r"export: 100%", done.stderr)
