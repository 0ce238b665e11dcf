"""`dalle-ds eval loss` reports the bound on ln p(image, caption): equal to a plain twin, from the images that were encoded."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_ds.commands.eval.loss import evaluate_export
from dalle_ds.data.images import prior_crop, seed_of
from dalle_ds.data.raw.shards import split_of
from dalle_ds.errors import DataError
from dalle_ds.sampling.export import load_export
from dalle_ds.storage.weights import read_weights, write_weights
from preprocessing.configs import EncodeConfig
from preprocessing.stages import encode
from tests.data.token_sets import COLORS, make_token_set
from tests.sampling.exports import make_export_of
from tests.support.images import encoded

FRACTION, N_SHARDS, LN_B_MIN = 0.5, 3, -0.5


def pixels_of(key: str, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, int(key))).integers(0, 256, (12, 14, 3), dtype=np.uint8)


def caption_of(key: str) -> str:
    return f"A {COLORS[int(key) % 6]} square {key}."


def write_raw(root: Path, seed: int = 0) -> Path:
    """Tars of bitmaps, so that other images have the same sizes."""
    root.mkdir(parents=True)
    for shard in range(N_SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for n in range(14):
                key = f"{shard}{n:02d}"
                image = encoded(Image.fromarray(pixels_of(key, seed)), "BMP")
                for name, data in ((f"{key}.bmp", image), (f"{key}.txt", caption_of(key).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("bound")
    parts = Path(make_token_set(home / "parts"))
    dvae = read_weights(parts / "dvae.safetensors", "dvae")
    extra = {"ln_b_min": str(LN_B_MIN)}
    write_weights(parts / "dvae.safetensors", kind="dvae", config=dvae.config, state=dvae.state, extra=extra)
    encode.run(
        EncodeConfig(
            raw=str(write_raw(home / "raw")),
            dvae=str(parts / "dvae.safetensors"),
            tokenizer=str(parts / "tokenizer.model"),
            out=str(home / "tokens"),
            validation_fraction=FRACTION,
            workers=1,
            device="cpu",
        )
    )
    make_export_of(str(home / "tokens"), home)
    return home


def plain_twin(home: Path) -> list[tuple[float, float, float]]:
    """-ln p of caption, codes and pixels for each validation pair, one at a time, from the definitions."""
    export, losses = load_export(home / "export"), []
    keys = [f"{shard}{n:02d}" for shard in range(N_SHARDS) for n in range(14)]
    edges = torch.logit((torch.arange(257, dtype=torch.float64) - 0.5) * (0.8 / 255) + 0.1)
    for key in (key for key in keys if split_of(key, FRACTION) == "validation"):
        crop_CHW = torch.from_numpy(prior_crop(pixels_of(key, 0), 8, seed_of(key))).permute(2, 0, 1)
        codes_1N = export.dvae.tokens(crop_CHW[None])
        nll = export.prior(export.text([caption_of(key)]), codes_1N)
        mu, ln_b = export.dvae.decoder.from_codes(codes_1N.view(1, 4, 4))[0].double().chunk(2)
        laplace = torch.distributions.Laplace(mu, ln_b.clamp(min=LN_B_MIN).exp())
        values = crop_CHW.long()
        mass = laplace.cdf(edges[values + 1]) - laplace.cdf(edges[values])
        losses.append((nll.text_sum.item(), nll.image_sum.item(), -mass.log().sum().item()))
    return losses


def test_the_bound_is_that_of_the_definitions(home: Path, tmp_path: Path) -> None:
    summary = evaluate_export(str(home / "export"), tmp_path, batch=5)
    twin = np.array(plain_twin(home))
    bound = json.loads((tmp_path / "evaluate.json").read_text())["bound"]
    assert bound["n_pairs"] == len(twin) == summary["bound_pairs"] > 10
    for name, expected in zip(("caption_nats", "codes_nats", "pixels_nats"), twin.mean(0), strict=True):
        assert bound[name] == pytest.approx(expected, rel=1e-4) == summary[f"bound/{name}"]
    assert bound["nats"] == pytest.approx(twin.sum(1).mean(), rel=1e-4)
    assert bound["nats_low"] < bound["nats"] < bound["nats_high"]
    assert bound["bits_per_subpixel"] == pytest.approx(bound["nats"] / math.log(2) / (3 * 8 * 8))
    assert any("length of a caption" in line for line in bound["leaves_out"]) and "all codes but" in summary["bound_leaves_out"]


def test_fewer_pairs_or_none(home: Path, tmp_path: Path) -> None:
    assert evaluate_export(str(home / "export"), tmp_path / "few", bound_pairs=4)["bound_pairs"] == 4
    none = evaluate_export(str(home / "export"), tmp_path / "none", bound_pairs=0)
    assert not any("bound" in name for name in none)


def test_raw_shards_that_moved_or_are_gone(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there = evaluate_export(str(home / "export"), tmp_path / "there")
    (home / "raw").rename(tmp_path / "moved")
    try:
        gone = evaluate_export(str(home / "export"), tmp_path / "gone")
        assert "bound/nats" not in gone and "raw shards of" in caplog.text and "--raw" in caplog.text
        assert json.loads((tmp_path / "gone" / "evaluate.json").read_text()).get("bound") is None
        moved = evaluate_export(str(home / "export"), tmp_path / "m", raw=str(tmp_path / "moved"))
        assert moved["bound/nats"] == there["bound/nats"]
        others = write_raw(tmp_path / "others", seed=1)
        with pytest.raises(DataError, match="of its codes equal those of the data set, expected at least 95%: it is a"):
            evaluate_export(str(home / "export"), tmp_path / "o", raw=str(others))
        (tmp_path / "moved" / "1.tar").unlink()
        with pytest.raises(DataError, match="has no raw shard 1, which the data set was encoded from"):
            evaluate_export(str(home / "export"), tmp_path / "o", raw=str(tmp_path / "moved"))
    finally:
        write_raw(home / "raw") if not (home / "raw").exists() else None
