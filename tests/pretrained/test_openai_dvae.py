"""Files in the form of OpenAI's release (pickled modules of its package), read without the package and without running code."""

import os
from pathlib import Path

import pytest
import torch

from dalle_ds.cli import main
from dalle_ds.errors import DataError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.ops.logit_laplace import map_pixels
from dalle_ds.pretrained.openai_dvae import import_openai
from dalle_ds.storage.weights import read_weights

dall_e = pytest.importorskip("dall_e", reason="the reference package of the test extra is not installed")


@pytest.fixture(scope="module")
def released() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    decoder = dall_e.Decoder(n_init=16, n_hid=64, n_blk_per_group=1, vocab_size=512)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            if parameter.ndim == 1:
                parameter.normal_(std=0.1)
    return encoder, decoder


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_same_tokens_and_pixels_as_the_reference(released, tmp_path: Path, form: str) -> None:
    for name, module in zip(("encoder", "decoder"), released, strict=True):
        content = module.state_dict() if form == "state dict" else module
        torch.save(content, tmp_path / f"{name}.pkl")
    paths = [str(tmp_path / name) for name in ("encoder.pkl", "decoder.pkl", "dvae.safetensors")]
    summary = import_openai(*paths, image_size=32)
    assert (summary["n_blk_per_group"], summary["n_hid"], summary["n_codes"]) == (1, 64, 512)
    weights = read_weights(paths[2], "dvae")
    assert weights.fingerprint == summary["fingerprint"]
    ours = DVAE(DVAEConfig(**weights.config))
    ours.load_state_dict(weights.state)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = released[0](map_pixels(images)).argmax(1)
        one_hot = torch.nn.functional.one_hot(tokens, 512).permute(0, 3, 1, 2).float()
        pixels = dall_e.unmap_pixels(torch.sigmoid(released[1](one_hot).float()[:, :3]))
    assert torch.equal(ours.tokens(images), tokens.flatten(1)) and len(tokens.unique()) > 3
    found = ours.decode_tokens(tokens.flatten(1))
    assert (found.float() - pixels * 255).abs().max() <= 0.51, "ours rounds to whole levels"


class _Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_code_in_a_file_does_not_run(released, tmp_path: Path) -> None:
    torch.save({"blocks.input.w": _Attack(tmp_path / "owned")}, tmp_path / "encoder.pkl")
    torch.save(released[1], tmp_path / "decoder.pkl")
    with pytest.raises(DataError, match=r"encoder.pkl cannot be read as OpenAI's encoder or .*: .*unsupported GLOBAL.*mkdir"):
        import_openai(str(tmp_path / "encoder.pkl"), str(tmp_path / "decoder.pkl"), str(tmp_path / "out.safetensors"))
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out.safetensors").exists()


def test_mistakes(released, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(released[0], tmp_path / "encoder.pkl")
    torch.save(released[1], tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    torch.save([1], tmp_path / "list.pkl")
    for decoder, message in (
        ("encoder.pkl", "not the encoder and decoder"),
        ("old.pkl", "save it again"),
        ("list.pkl", "list without weights"),
        ("none.pkl", "none.pkl: no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["import-dvae", *(str(tmp_path / name) for name in ("encoder.pkl", decoder, "dvae.safetensors"))])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def _cyclic() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.ReLU())
    module._modules["self"] = module
    return module


def _of_texts() -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.ReLU())
    module._modules, module._parameters = {"a": "no module"}, ["no mapping"]
    return module


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        {1: torch.zeros(2)},
        {"blocks.input.w": torch.zeros(())},
        {"blocks.input.w": torch.zeros(2, 3, 1, 1), "blocks.group_9999999999.block_1.w": torch.zeros(1)},
        {"blocks.input.w": "text"},
        _cyclic(),
        _of_texts(),
    ],
    ids=["list", "number", "keys", "scalar", "groups", "text", "cyclic", "modules of texts"],
)
def test_crafted_files_are_refused_with_a_message(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "crafted.pkl")
    with pytest.raises(DataError, match="crafted.pkl"):
        import_openai(*[str(tmp_path / "crafted.pkl")] * 2, str(tmp_path / "dvae.safetensors"), image_size=32)
    assert not (tmp_path / "dvae.safetensors").exists()
