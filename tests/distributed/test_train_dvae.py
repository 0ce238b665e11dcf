"""Training the dVAE on two ranks with the real launchers, stopped, killed and resumed, gives the run of one process."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dalle_ds.recipes import dump_recipe
from dalle_ds.storage.weights import read_weights
from tests.distributed.cases.dvae import from_clusters, recipe, trained
from tests.support import launching
from tests.training.dvae.runs import make_raw

pytestmark = pytest.mark.launch

NO_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def torchrun() -> list[str]:
    return ["torchrun", "--nproc_per_node", "2", "--master_port", str(launching.free_port())]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was stopped by SIGTERM to one rank, resumed, and killed. "fewer" is a copy of it after the kill."""
    home = tmp_path_factory.mktemp("dvae")
    make_raw(home / "raw")
    (home / "recipe.yaml").write_text(dump_recipe(recipe(home, "killed")))
    verb = ["dalle_ds.cli", "train", "dvae", str(home / "recipe.yaml")]

    def saved() -> set[Path]:
        return set(home.glob("killed/checkpoints/update_*/checkpoint.json"))

    with launching.started([*launching.deepspeed(2), "--no_local_rank", "--module", *verb], home, NO_RETRIES) as process:
        launching.wait_for(saved, "checkpoint", process=process)
        launching.ranks_of(process.pid)[1].terminate()
        _, errors = process.communicate(timeout=900)
    assert process.returncode == 143, errors[-4000:]
    assert "asked to stop (another rank)" in errors and "error" not in errors.replace("exits with return code", ""), errors
    at_the_stop = saved()
    with launching.started([*torchrun(), "-m", *verb], home, NO_RETRIES) as process:
        launching.wait_for(lambda: saved() - at_the_stop, "another checkpoint", process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=900)
    assert "resuming at update" in errors
    assert not (home / "killed" / "dvae_report.json").exists(), "it was faster than the kill"
    shutil.copytree(home / "killed", home / "fewer")
    return home


@pytest.fixture(scope="module")
def on_two_ranks(home: Path) -> dict[str, Any]:
    cases = str(Path(__file__).parent / "cases" / "dvae.py")
    done = launching.run([*torchrun(), cases, str(home)], home)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('{"whole"') == 1, "one summary"
    return launching.last_json(done.stdout)


def test_two_ranks_do_what_one_does(home: Path, on_two_ranks: dict[str, Any]) -> None:
    alone, whole = trained(recipe(home, "alone")), on_two_ranks["whole"]
    assert len(whole["seen"]) == 40 and whole["seen"][-1][3] > 10, "unusable images were met"
    for (*found, unusable), (*expected, other_unusable) in zip(whole["seen"], alone["seen"], strict=True):
        # Two ranks sum in another order. So from some update on, a hidden unit is active in one of the two runs only. On some
        # CPUs this happens within these 40 updates.
        assert found == pytest.approx(expected, rel=1e-5 if found[0] <= 20 else 2e-3, abs=1e-5) and unusable == other_unusable
    assert_same_weights(home, "whole", "alone", 3e-4)
    for name in ("psnr", "ssim", "perplexity", "kl_per_cell", "elb_hard", "elb_relaxed"):
        assert whole[name] == pytest.approx(alone[name], rel=2e-2), name


def test_two_ranks_cluster_what_one_does(home: Path, on_two_ranks: dict[str, Any]) -> None:
    alone, pair = trained(from_clusters(home, "clusters_alone")), on_two_ranks["clusters"]
    for found, expected in zip(pair["seen"], alone["seen"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3), "of updates without codes, and of those after k-means"
    assert len(pair["seen"]) == 10


def test_stopped_and_killed_and_gone_on_with_is_the_uninterrupted_run(on_two_ranks: dict[str, Any]) -> None:
    whole, killed = on_two_ranks["whole"], on_two_ranks["killed"]
    assert 4 <= killed["seen"][0][0] < 40
    n_left = len(killed["seen"])
    assert [seen[:3] for seen in killed["seen"]] == [seen[:3] for seen in whole["seen"][-n_left:]]
    assert killed["dvae"] == whole["dvae"], "the fingerprint of the weights"


def test_one_rank_goes_on_where_two_were(home: Path, on_two_ranks: dict[str, Any]) -> None:
    fewer = trained(recipe(home, "fewer"))
    assert fewer["seen"][0][0] == on_two_ranks["killed"]["seen"][0][0]
    assert_same_weights(home, "fewer", "whole", 3e-4)


def assert_same_weights(home: Path, one: str, other: str, tolerance: float) -> None:
    states = [read_weights(home / name / "dvae.safetensors", "dvae").state for name in (one, other)]
    for name, weight in states[0].items():
        assert (weight - states[1][name]).abs().max() <= tolerance, name
