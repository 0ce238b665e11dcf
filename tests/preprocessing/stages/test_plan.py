"""Plan: arithmetic on given or measured figures; the summary names the source of each figure."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from dalle_ds.cli import app
from dalle_ds.data.manifest import ShardManifest, load_shard_manifests
from preprocessing.configs import DataPlanConfig
from preprocessing.stages import encode, plan
from tests.preprocessing.conftest import N_IMAGES, World


def test_given_figures() -> None:
    result = CliRunner().invoke(
        app,
        [
            "data",
            "plan",
            "--pairs",
            "250e6",
            "--gpu-rate",
            "500",
            "--raw-bytes",
            "40e3",
            "--price",
            "2",
            "--accepted",
            "0.8",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    for part in ('"shards": 25000', '"samples": 200000000', '"raw_terabytes": 10.0', '"gpu_hours": 138.8', '"cost": 277.7'):
        assert part in result.output


def test_measured_figures_are_those_of_the_manifests(world: World, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    encode.run(world.config(out))
    manifests = load_shard_manifests(out, ShardManifest)
    summary = plan.run(DataPlanConfig(pairs=1e6, measured=out, samples_per_shard=1000, workers=2)).summary
    seconds = sum(manifest.seconds for manifest in manifests)
    assert summary["worker_hours"] == pytest.approx(1e6 * seconds / N_IMAGES / 3600)
    assert summary["token_gigabytes"] == pytest.approx(
        sum(part.bytes for m in manifests for part in m.splits.values()) / N_IMAGES / 1e3
    )
    assert set(summary["from"].values()) == {f"measured in {out}"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "no rate"),
        (["--rate", "0"], "--rate is 0.0"),
        (["--rate", "1", "--accepted", "2"], "fraction of at most 1"),
        (["--measured", "/nowhere"], "no token data set"),
    ],
)
def test_bad_figures_are_refused(options: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["data", "plan", *options])
    assert result.exit_code != 0
    assert told in result.output + capfd.readouterr().err
