"""launchers/train_prior.sh with the real launchers: every way to start, stop and resume it."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.parallel.checkpoint_tensors import ENGINE_FILE
from dalle_ds.sampling.export import load_export
from dalle_ds.storage import objects
from dalle_ds.storage.record import unseal
from dalle_ds.training.preemption import EXIT_STOPPED
from dalle_ds.training.prior.export import export_checkpoint
from dalle_ds.training.prior.samples import SampleSheets
from tests.conftest import S3
from tests.data.token_sets import make_token_set
from tests.support import kubernetes, launching

pytestmark = pytest.mark.launch

SMALL = [
    "model.n_layers=2",
    "model.n_heads=1",
    "global_batch=16",
    "micro_batch=4",
    "updates=8",
    "checkpoint.every=3",
    "validation.every=4",
    "validation.samples=16",
    "tracking.every=1",
    "learning_rate.warmup_updates=2",
    "data.caption_dropout=0",
    "sampling.guidance=1",
]
PHASES = ("data_wait", "forward", "backward", "reduce", "step", "other")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory like the one that the demo leaves, with the data of the default recipe."""
    home = tmp_path_factory.mktemp("home")
    make_token_set(home / "runs" / "demo" / "tokens", n_samples=96, n_validation=32)
    return home


@pytest.fixture(scope="module")
def env(home: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}


def settings(folder: str, *more: str) -> list[str]:
    return launching.words(*SMALL, f"folder={folder}", *more)


def train(home: Path, env: dict[str, str], folder: str, *more: str, n_ranks: int = 2) -> dict[str, Any]:
    command = [*launching.deepspeed(n_ranks), launching.TRAIN_PRIOR, *launching.TINY, *settings(folder, *more), "--json"]
    done = launching.run(command, home, env)
    assert done.returncode == 0, done.stderr[-4000:]
    return launching.last_json(done.stdout)


@pytest.fixture(scope="module")
def uninterrupted(home: Path, env: dict[str, str]) -> dict[str, Any]:
    return train(home, env, "whole", "tracking.profile_every=5", "tracking.peak_tflops=0.5")


def test_recipe_on_two_ranks(uninterrupted: dict[str, Any], home: Path) -> None:
    assert (uninterrupted["updates"], uninterrupted["resumed_at"]) == (8, 0)
    assert uninterrupted["loss/validation/image"] < 3.4, "ln 32 is 3.47: nothing was learned"
    assert Path(home, uninterrupted["checkpoint"]).name == "update_00000008"
    summary = home / "whole" / "summary.json"
    assert unseal(summary.read_bytes(), summary) == uninterrupted
    assert json.loads((home / "whole" / "deepspeed.json").read_text())["gradient_clipping"] == 4.0


def test_mlflow_tells_the_story(uninterrupted: dict[str, Any], home: Path, env: dict[str, str]) -> None:
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    run = client.get_run(json.loads((home / "whole" / "mlflow_run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    scales = [name for name in run.data.metrics if name.startswith("gradient_scale_log2/")]
    assert sorted(scales) == [f"gradient_scale_log2/layers.{i}.{block}" for i in (0, 1) for block in ("attention", "mlp")]
    for name in (
        "loss/train/total",
        "loss/train/text",
        "loss/train/image",
        "optimizer/gradient_norm",
        "optimizer/skipped_updates",
        "optimizer/learning_rate",
        "speed/tokens_per_second",
        "memory/cpu_peak_gigabytes",
    ):
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == list(range(1, 9)), name
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/validation/image")]
    assert steps == [0, 4, 8]
    info = json.loads((home / "runs" / "demo" / "tokens" / "dataset.json").read_text())
    assert {key: run.data.tags[f"provenance.{key}"] for key in ("dvae", "tokenizer")} == {
        k: info[k] for k in ("dvae", "tokenizer")
    }
    assert run.data.tags["provenance.data"] == info["fingerprint"]
    inputs = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    assert inputs == {"token_shards": info["fingerprint"], "dvae": info["dvae"], "tokenizer": info["tokenizer"]}
    assert run.data.params["learning_rate.peak"] == "0.005"
    assert "optimizer.beta2" not in run.data.params, "it is the paper's"
    assert f"run_uuid={run.info.run_id}" in run.data.tags["mlflow.note.content"]
    tokens, tflops = (losses(home, env, "whole", f"speed/{name}")[-1] for name in ("tokens_per_second", "model_tflops"))
    assert tokens > 0 and 0 < tflops < 1, "a small model on a CPU"
    assert losses(home, env, "whole", "speed/mfu")[-1] == pytest.approx(tflops / (2 * 0.5)), "two ranks of half a TFLOP/s"
    shares = [losses(home, env, "whole", f"time_share/{phase}") for phase in PHASES]
    assert [sum(at_update) for at_update in zip(*shares, strict=True)] == pytest.approx([1.0] * 8)
    assert all(share[-1] > 0 for share in shares)
    (collectives,) = losses(home, env, "whole", "time_share/collectives")
    assert 0 < collectives < 1


def test_a_run_killed_after_its_last_checkpoint_is_brought_to_its_end(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str]
) -> None:
    """As after a kill between the last commit and summary.json; with another number of ranks."""
    shutil.copytree(home / "whole", home / "half")
    (home / "half" / "summary.json").unlink()
    (home / "half" / "mlflow_spool" / "ended").unlink()
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    run_id = json.loads((home / "half" / "mlflow_run.json").read_text())["run_id"]
    client.update_run(run_id, status="RUNNING")
    ended = train(home, env, "half", n_ranks=1)
    assert (ended["resumed_at"], ended["updates"]) == (8, 8)
    for key in ("loss/validation/image", "loss/validation/text"):
        assert ended[key] == pytest.approx(uninterrupted[key], abs=1e-4), key
    assert unseal((home / "half" / "summary.json").read_bytes(), "summary.json") == ended
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.s3
def test_killed_run_ends_as_the_uninterrupted_one(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine resumes the run. Only the checkpoints on object storage are left of it."""
    place = f"{s3.url}/killed"
    there = settings("killed", f"checkpoint.folder={place}")
    command = [*launching.deepspeed(2), launching.TRAIN_PRIOR, *launching.TINY, *there]
    with launching.started(command, home, env) as process:
        first = f"{place}/update_00000003/checkpoint.json"
        launching.wait_for(lambda: objects.exists(first), "first checkpoint", process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    shutil.rmtree(home / "killed")
    resumed = train(home, env, "killed", f"checkpoint.folder={place}")
    assert resumed["resumed_at"] in (3, 6)
    for key in ("loss/validation/image", "loss/validation/text", "updates", "skipped_updates"):
        assert resumed[key] == uninterrupted[key], key
    monkeypatch.chdir(home)
    for run in ("killed", place):  # by the merged recipe in the run folder, and by the checkpoint folder's URL
        assert export_checkpoint(run, home / "export_s3")["update"] == 8


def test_torchrun_starts_all_ranks_again_where_one_was_killed(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str]
) -> None:
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    others = {run.info.run_id for run in client.search_runs(["1"])}
    command = ["torchrun", "--nproc_per_node", "2", "--max_restarts", "1", launching.TRAIN_PRIOR, *launching.TINY]
    with launching.started([*command, *settings("restarted"), "--json"], home, env) as process:
        first = home / "restarted" / "checkpoints" / "update_00000003" / "checkpoint.json"
        launching.wait_for(first.exists, "first checkpoint", process=process)
        launching.ranks_of(process.pid)[0].kill()
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    assert "error on rank 1: rank 0 (process " in err
    restarted = launching.last_json(out)
    assert restarted["resumed_at"] in (3, 6)
    for key in ("loss/validation/image", "loss/validation/text", "updates", "skipped_updates"):
        assert restarted[key] == uninterrupted[key], key
    (run,) = (run for run in client.search_runs(["1"]) if run.info.run_id not in others)
    assert run.info.status == "FINISHED"


def test_pods_of_kubernetes_go_on_after_one_was_preempted(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str]
) -> None:
    """The command of launchers/kubernetes/train_prior.yaml, twice on this machine. Each pod gets half of the cores: a rank then
    has as many threads as one of two ranks of a launcher, and sums in the same order."""
    arguments = [*launching.TINY, *settings("preempted", "checkpoint.every=1"), "--json"]
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    n_cores = max(1, len(cores) // 2)
    first = f"127.0.0.1:{launching.free_port()}"

    def started(index: int) -> AbstractContextManager[subprocess.Popen[str]]:
        command, variables = kubernetes.pod("train_prior.yaml", index, arguments, NODES="2", GPUS="1", FIRST=first)
        own = ",".join(cores[index * n_cores :][:n_cores] or cores)
        return launching.started(["taskset", "--cpu-list", own, *command], home, {**env, **variables})

    with started(0) as kept, started(1) as preempted:
        checkpoint = home / "preempted" / "checkpoints" / "update_00000001" / "checkpoint.json"
        launching.wait_for(checkpoint.exists, "first checkpoint", process=kept)
        preempted.terminate()
        for pod in (kept, preempted):
            _, err = pod.communicate(timeout=900)
            assert pod.returncode == EXIT_STOPPED, err[-4000:]
    with started(0) as kept, started(1) as replacement:
        out, err = kept.communicate(timeout=900)
        assert kept.returncode == 0, err[-4000:]
        replacement.communicate(timeout=900)
        assert replacement.returncode == 0
    resumed = launching.last_json(out)
    assert 1 <= resumed["resumed_at"] < 8
    for key in ("loss/validation/image", "loss/validation/text", "updates", "skipped_updates"):
        assert resumed[key] == uninterrupted[key], key


def test_export_gives_the_engines_losses(uninterrupted: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    summary = export_checkpoint("whole", "export")
    assert summary["update"] == 8
    assert summary["parity"]["tokens"] == 4 * 16
    assert summary["parity"]["max_difference_same_format"] < 1e-4
    assert summary["parity"]["max_difference_fp32"] < 1e-2
    plain = export_checkpoint("whole", "export_last", ema=False)
    assert plain["fingerprint"] != summary["fingerprint"]


def test_samples_while_training_are_those_of_the_export(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    run_id = json.loads((home / "whole" / "mlflow_run.json").read_text())["run_id"]
    drawn = np.asarray(Image.open(client.download_artifacts(run_id, "latest_images/samples.png", str(tmp_path))))
    dataset = str(home / "runs" / "demo" / "tokens")
    export_checkpoint(home / "whole", tmp_path / "export")
    export = load_export(tmp_path / "export")
    sheets = SampleSheets(export.prior.config, TokenDataset(dataset, "validation"), torch.device("cpu"))
    weights = dict(export.prior.named_parameters())
    again = np.asarray(sheets.draw(sheets.prior(weights), update=8)())
    other = np.asarray(sheets.draw(sheets.prior({name: -weight for name, weight in weights.items()}), update=8)())
    assert (
        sheets.scores(sheets.prior(weights))
        == {}
        == {name: value for name, value in client.get_run(run_id).data.metrics.items() if name.startswith("scenes/")}
    ), "these captions are no scenes"
    # the engine gathers the branches' weights as fp16, so a few tokens may differ
    assert (drawn != again).mean() < 0.05 < (drawn != other).mean()


def losses(home: Path, env: dict[str, str], folder: str, name: str) -> list[float]:
    run_id = json.loads((home / folder / "mlflow_run.json").read_text())["run_id"]
    return [point.value for point in MlflowClient(env["MLFLOW_TRACKING_URI"]).get_metric_history(run_id, name)]


def test_a_skipped_update_loses_no_averaging_of_the_weights(home: Path, env: dict[str, str]) -> None:
    """All updates overflow. Averagings are due at every second one."""
    tree = json.loads((launching.ROOT / "ds_configs" / "zero3_fp16_cpu.json").read_text())
    tree["fp16"] |= {"initial_scale_power": 60, "min_scale_power": 60, "max_scale_power": 60}
    (home / "overflowing.json").write_text(json.dumps(tree))
    summary = train(home, env, "skipped", "ema.every=2", "updates=4", "deepspeed_config=overflowing.json")
    assert summary["skipped_updates"] == 4
    (engine,) = Path(home, summary["checkpoint"]).rglob(ENGINE_FILE)
    assert json.loads(engine.read_text())["client"]["n_ema_updates"] == 2


@pytest.fixture(scope="module")
def dropped(home: Path, env: dict[str, str]) -> dict[str, Any]:
    """A run of two updates with dropped captions, after a calibration."""
    tree = json.loads((launching.ROOT / "ds_configs" / "zero3_fp16_cpu.json").read_text())
    tree["fp16"]["calibration_trials"] = 4
    (home / "calibrated.json").write_text(json.dumps(tree))
    return train(home, env, "dropped", "data.caption_dropout=0.5", "updates=2", "deepspeed_config=calibrated.json")


def test_calibrated_scales_before_the_first_update(dropped: dict[str, Any], home: Path, env: dict[str, str]) -> None:
    assert dropped["skipped_updates"] == 0
    scales = losses(home, env, "dropped", "gradient_scale_log2/layers.0.mlp")
    assert scales[0] > 16, "the paper's start is 13"
    assert scales[1] == pytest.approx(scales[0] + 1 / 1000, abs=1e-4)


def test_captions_dropped_in_training_alone_and_recorded_in_the_export(
    uninterrupted: dict[str, Any], dropped: dict[str, Any], home: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for name, is_same in (("loss/validation/text", True), ("loss/validation/image", True), ("loss/train/text", False)):
        first, of_whole = (
            losses(home, env, "dropped", name)[0],
            losses(home, env, "whole", name)[0],
        )  # before the first update, weights are equal
        assert (first == of_whole) == is_same, f"{name}: {first}, {of_whole} without dropout"
    for folder, expected in (("whole", 0.0), ("dropped", 0.5)):
        export_checkpoint(folder, home / f"export_{folder}")
        assert load_export(home / f"export_{folder}").record.caption_dropout == expected


def test_matrices_without_masters_are_trained_saved_and_exported(
    uninterrupted: dict[str, Any], home: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the recipe switches masters off. The initial weights are
    equal up to rounding to fp16, and losses fall as with masters."""
    monkeypatch.chdir(home)
    done = train(home, env, "masterless", "optimizer.master=none", "optimizer.moments=low_bit")
    assert done["updates"] == 8 and done["skipped_updates"] == 0
    ours, whole = (losses(home, env, folder, "loss/train/total") for folder in ("masterless", "whole"))
    assert ours == pytest.approx(whole, rel=0.01) and ours[-1] < ours[0]
    export_checkpoint("masterless", home / "export_masterless")  # the export checks that it gives the run's losses
    assert load_export(home / "export_masterless").record.caption_dropout == 0.0


def test_literal_command_stops_on_sigterm_and_bash_goes_on(home: Path, env: dict[str, str]) -> None:
    """Run `deepspeed launchers/train_prior.sh` without arguments, then `bash launchers/train_prior.sh` in the same folder."""
    folder = home / "runs" / "demo" / "prior"
    command = [*launching.deepspeed(None), launching.TRAIN_PRIOR]
    with launching.started(command, home, env) as process:
        launching.wait_for((folder / "recipe.yaml").exists, "start of training", process=process)
        # the launcher does not forward the signal, so its ranks must notice that the launcher is gone
        process.terminate()
        launching.wait_for(lambda: list(folder.glob("checkpoints/update_*/checkpoint.json")), "saved state")
        launching.wait_for(lambda: not launching.ranks_of(process.pid), "end of the ranks", timeout=900)
    saved = json.loads(next(folder.glob("checkpoints/update_*/checkpoint.json")).read_text())["update"]
    assert 0 < saved < 800
    port = {"DS_LAUNCH_ARGS": f"--master_port {launching.free_port()}"}
    more = ["--set", f"updates={saved + 2}", "--set", "validation.samples=16", "--set", "learning_rate.peak=1e-3", "--json"]
    done = launching.run(["bash", launching.TRAIN_PRIOR, *more], home, {**env, **port})
    assert done.returncode == 0, done.stderr[-4000:]
    summary = launching.last_json(done.stdout)
    assert (summary["resumed_at"], summary["updates"]) == (saved, saved + 2)
    (warning,) = [line for line in done.stderr.splitlines() if "was trained with other settings" in line]
    assert warning.endswith(f"updates: before 4600, now {saved + 2}; learning_rate.peak: before 0.005, now 0.001")


def test_error_reaches_the_exit_code_of_the_launcher(home: Path, env: dict[str, str]) -> None:
    done = launching.run(
        [*launching.deepspeed(1), launching.TRAIN_PRIOR, "--set", "global_batch=7", "--set", "micro_batch=2"], home, env
    )
    assert done.returncode == 2
    assert "global_batch 7 is not a multiple of micro_batch 2" in done.stderr
