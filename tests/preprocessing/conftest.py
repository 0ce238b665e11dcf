"""Shared fixtures of the stage tests: raw shards of drawn images, a tiny dVAE with random weights, a tokenizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dalle_ds.data.manifest import ShardManifest, load_shard_manifests
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage.weights import write_weights
from preprocessing.configs import EncodeConfig, IngestConfig, TokenizerConfig
from preprocessing.executors import local
from preprocessing.stages import ingest, tokenizer
from tests.support.images import draw_folder

N_IMAGES = 60
N_SHARDS = 15


def write_dvae(path: Path, seed: int = 0, image_size: int = 32, extra: dict[str, str] | None = None) -> str:
    """Write a tiny dVAE with random weights (8x8 tokens, 32 codes). Returns its fingerprint."""
    torch.manual_seed(seed)
    config = DVAEConfig(image_size=image_size, n_groups=3, n_blk_per_group=1, n_hid=16, n_init=8, n_codes=32)
    dvae = DVAE(config)
    with torch.no_grad():  # spread the logits, so that random weights use many codes
        dvae.encoder.blocks.output.conv.w.mul_(20)
    return write_weights(path, kind="dvae", config=config.model_dump(), state=dvae.state_dict(), extra=extra)


def part_checksums(root: str) -> dict[str, dict[str, str]]:
    """{shard: {split: SHA-256}}, equal for equal content."""
    return {
        manifest.shard: {split: part.checksum for split, part in manifest.splits.items()}
        for manifest in load_shard_manifests(root, ShardManifest)
    }


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on shared cores, two threads of a tiny convolution spend their time waiting for each other.

    The scope is the session, as for `world`: otherwise the stages that `world` runs would leave two threads to all later tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "n_cores", lambda: 1)
        torch.set_num_threads(1)
        yield


@dataclass(frozen=True)
class World:
    """Paths of the inputs. `config` returns an encode config with given changes."""

    images: Path
    raw: str
    dvae: str
    tokenizer: str

    def config(self, out: object, **more: object) -> EncodeConfig:
        values = {"raw": self.raw, "dvae": self.dvae, "tokenizer": self.tokenizer, "workers": 1, "validation_fraction": 0.2}
        return EncodeConfig(**{**values, "out": str(out), "block_samples": 3, "batch": 4, "device": "cpu", **more})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    images, raw = draw_folder(folder / "images", N_IMAGES), str(folder / "raw")
    ingest.run(IngestConfig(images=str(images), out=raw, samples_per_shard=N_IMAGES // N_SHARDS, workers=1))
    write_dvae(folder / "dvae.safetensors")
    tokenizer.run(TokenizerConfig(raw=raw, out=str(folder / "tokenizer.model"), vocab_size=400, validation_fraction=0.2))
    return World(images, raw, str(folder / "dvae.safetensors"), str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Checksums of the parts that an undisturbed encode run writes."""
    from preprocessing.stages import encode

    out = str(tmp_path_factory.mktemp("undisturbed") / "tokens")
    assert encode.run(world.config(out)).is_complete
    return part_checksums(out)


@pytest.fixture
def is_undisturbed(undisturbed: dict[str, dict[str, str]]) -> Callable[[str], bool]:
    """Returns a function: whether the parts below a root equal those of an undisturbed run, byte for byte."""
    return lambda root: part_checksums(root) == undisturbed
