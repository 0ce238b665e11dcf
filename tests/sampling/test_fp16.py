"""Sampling with fp16 residual branches: half the memory, nearly the same tokens, and a record that says so."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_ds.commands.sample import repeat_export, sample_export
from dalle_ds.errors import ConfigError
from dalle_ds.models.resblock import BranchLinear
from dalle_ds.precision.fp16_branches import use_fp16_branches
from dalle_ds.sampling.agreement import fp16_agreement
from dalle_ds.sampling.captions import SampleSource
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.generate import generate, pick
from dalle_ds.sampling.settings import SamplingConfig
from tests.sampling.exports import make_export, repeat_samples

CAPTIONS = ["A red square.", "A blue ring.", "Two green dots."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("fp16"))


def test_matrices_of_branches_are_fp16_and_tokens_nearly_the_same(folder: Path) -> None:
    whole, half = load_export(folder), load_export(folder, use_fp16=use_fp16_branches)
    assert (whole.dtype, half.dtype, whole.fingerprint == half.fingerprint) == (None, "fp16", True)
    matrices = {f"{name}.weight" for name, module in half.prior.named_modules() if isinstance(module, BranchLinear)}
    assert len(matrices) == 3 * 4
    for name, parameter in half.prior.named_parameters():
        assert parameter.dtype is (torch.float16 if name in matrices else torch.float32), name
    text_CT = whole.text(CAPTIONS)
    codes_CKN = generate(whole.prior, text_CT, [[3 * c + k for k in range(8)] for c in range(len(CAPTIONS))])
    text_BT, codes_BN = text_CT.repeat_interleave(8, 0), codes_CKN.flatten(0, 1)
    draws_BN = torch.rand(codes_BN.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [export.prior.image_logits(text_BT, codes_BN) for export in (whole, half)]
    picked = [pick(of_one.flatten(0, 1), draws_BN.flatten(), 1.0) for of_one in logits]
    agreement = (picked[0] == picked[1]).double().mean().item()
    assert not torch.equal(*logits) and agreement > 0.98
    assert fp16_agreement(whole.prior, text_BT, codes_BN) == agreement, "of one copy of the weights, a sample at a time"
    assert whole.dtype == "fp16"
    again_CKN = generate(half.prior, text_CT, [[3 * c + k for k in range(8)] for c in range(len(CAPTIONS))])
    assert (again_CKN == codes_CKN).double().mean() > 0.9, "and token by token"


def test_a_folder_in_fp16_says_so_and_is_repeated_in_fp16(folder: Path, tmp_path: Path) -> None:
    settings, source = SamplingConfig(n=2), SampleSource(captions=CAPTIONS)
    for dtype in ("fp32", "fp16"):
        sample_export(str(folder), tmp_path / dtype, settings, source, dtype=dtype)
    records = [json.loads((tmp_path / dtype / "samples.json").read_text()) for dtype in ("fp32", "fp16")]
    assert [record["dtype"] for record in records] == [None, "fp16"]
    with pytest.raises(ConfigError, match="other samples: dtype is fp16 there, None here"):
        sample_export(str(folder), tmp_path / "fp16", settings, source)
    with pytest.raises(ConfigError, match="was sampled in fp16, expected fp32"):
        repeat_samples(load_export(folder), tmp_path / "fp16" / "samples.json", tmp_path / "none")
    repeat_export(str(folder), tmp_path / "fp16" / "samples.json", tmp_path / "again")
    assert np.array_equal(*(np.load(tmp_path / name / "codes.npy") for name in ("fp16", "again")))
