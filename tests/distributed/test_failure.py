"""A run that loses a rank or its data, or diverges, ends soon with the reason. The same command resumes it."""

import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors import safe_open
from safetensors.torch import save_file

from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.data.tokens.dataset_files import load_index
from dalle_ds.data.tokens.mixture import MixtureOrder
from dalle_ds.data.tokens.order import slots_of_rank
from tests.data.token_sets import make_token_set
from tests.support import launching
from tests.support.sealed import edit_json

pytestmark = pytest.mark.launch

GLOBAL_BATCH, MICRO_BATCH = 4, 2
SMALL = [
    "model.n_layers=2",
    "model.n_heads=1",
    f"global_batch={GLOBAL_BATCH}",
    f"micro_batch={MICRO_BATCH}",
    "updates=400",
    "checkpoint.every=2",
    "validation.every=400",
    "validation.samples=16",
    "tracking.every=1",
    "folder=run",
    "learning_rate.warmup_updates=2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Folder of one run, which the tests continue in their order."""
    home = tmp_path_factory.mktemp("home")
    make_token_set(home / "runs" / "demo" / "tokens", n_samples=512, block_samples=4)
    shutil.copy(empty_store, home / "mlflow.db")
    return home


def command(*more: str, n_ranks: int = 2) -> list[str]:
    return [*launching.deepspeed(n_ranks), launching.TRAIN_PRIOR, *launching.TINY, *launching.words(*SMALL, *more)]


def env(home: Path) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}


def checkpoints(home: Path) -> list[Path]:
    return sorted(commit.parent for commit in home.glob("run/checkpoints/update_*/checkpoint.json"))


def tracked(home: Path) -> Any:
    (run,) = MlflowClient(f"sqlite:///{home}/mlflow.db").search_runs(["1"])  # a single MLflow run for all restarts
    return run


def wait_for_progress(home: Path, process: subprocess.Popen[str]) -> None:
    before = set(checkpoints(home))
    launching.wait_for(lambda: set(checkpoints(home)) - before, "new checkpoint", process=process)


def block_that_rank_1_alone_reads_first(data: Path) -> int:
    order = MixtureOrder([TokenDataset(data).block_sizes], seed=0, global_batch=GLOBAL_BATCH)
    first: list[dict[int, int]] = [{}, {}]
    for rank, seen in enumerate(first):
        slots = slots_of_rank(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, rank=rank, world_size=2)
        for update in range(40):
            for block in order.locations(update, slots).block.tolist():
                seen.setdefault(block, update)
    return next(block for block, update in first[1].items() if 5 <= update < 30 and first[0].get(block, 99) > update + 5)


def test_an_error_of_any_rank_ends_the_job_and_is_shown(home: Path) -> None:
    data = home / "runs" / "demo" / "tokens"
    number = block_that_rank_1_alone_reads_first(data)
    part, block = [(part, block) for part in load_index(data)[1].parts("train") for block in part.blocks][number]
    whole = (data / part.path).read_bytes()
    damaged = bytearray(whole)
    damaged[block.offset + 700] ^= 1
    (data / part.path).write_bytes(damaged)
    done = launching.run(command(), home, env(home))
    (data / part.path).write_bytes(whole)
    assert done.returncode != 0
    assert f"error on rank 1: {data.relative_to(home)}/{part.path}, block {block.name}" in done.stderr
    assert "error on rank 0: rank 1 failed: DataError" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints(home) and tracked(home).info.status == "FAILED"


def test_a_killed_rank_is_named_and_the_job_is_gone(home: Path) -> None:
    with launching.started(command(), home, env(home)) as process:
        wait_for_progress(home, process)
        launching.wait_for(lambda: tracked(home).info.status == "RUNNING", "the MLflow run to go on", process=process)
        victim = launching.ranks_of(process.pid)[1]
        victim.kill()
        out, err = process.communicate(timeout=240)  # less than torch's own timeout of ten minutes
        assert process.returncode != 0 and not launching.family(process.pid)
    assert f"error on rank 0: rank 1 (process {victim.pid}) " in err and "run the same command again" in err
    # the launcher sometimes notices the end of the rank before the other rank does
    assert "was killed by SIGKILL" in err or "return code = -9" in out
    assert "Traceback" not in err
    assert tracked(home).info.status == "FAILED"


def test_a_rank_that_hangs_does_not_hang_the_others(home: Path) -> None:
    with launching.started(command("failure.collective_timeout=5"), home, env(home)) as process:
        wait_for_progress(home, process)
        ranks = launching.ranks_of(process.pid)
        ranks[1].send_signal(signal.SIGSTOP)
        launching.wait_for(lambda: not ranks[0].is_running(), "end of the rank that waits")
        launching.kill_tree(process.pid)  # the launcher would wait half a minute for the stopped rank
        err = process.communicate()[1]
    assert "no answer from another rank within 5 s (failure.collective_timeout)" in err
    assert f"stopped: rank 1 (process {ranks[1].pid})" in err
    assert tracked(home).info.status == "FAILED"


JOIN = "from dalle_ds.commands.job import on_all_ranks; on_all_ranks(lambda ranks: {}, as_json=True)"
STOP = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); "


def start_rank(rank: int, program: str, cwd: Path, port: int) -> subprocess.Popen[str]:
    """Start one rank of a job of two ranks, without a launcher."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=launching.environment({**job, "DALLE_DS_START_SECONDS": "3"}),
        text=True,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_other_never_starts_ends_with_a_message(tmp_path: Path, rank: int) -> None:
    port = launching.free_port()
    with start_rank(rank, JOIN, tmp_path, port) as process:
        _, err = process.communicate(timeout=240)  # less than torch's own timeout of ten minutes
    assert process.returncode == 75, err
    assert f"error: rank {rank} of 2 waited for the others at 127.0.0.1:{port}" in err
    assert "not all have joined within 3 s (DALLE_DS_START_SECONDS)" in err and "Traceback" not in err


def test_a_rank_that_hangs_at_the_start_is_named(tmp_path: Path) -> None:
    port = launching.free_port()
    with start_rank(0, STOP + JOIN, tmp_path, port) as stopped, start_rank(1, JOIN, tmp_path, port) as process:
        _, err = process.communicate(timeout=240)
        stopped.kill()
    assert process.returncode == 75, err
    assert f"stopped on this machine: rank 0 (process {stopped.pid})" in err and "Traceback" not in err


def test_a_port_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with start_rank(0, JOIN, tmp_path, port) as process:
            _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert f"port {port} of 127.0.0.1 is taken by another process" in err and "Traceback" not in err


def test_a_rank_where_no_error_comes_is_ended(tmp_path: Path) -> None:
    """A GPU may wait for a dead rank without an error. Here, a sleep stands in for the GPU."""
    program = """if True:
        import os, signal, sys, time, torch, torch.distributed as dist
        from dalle_ds.parallel.ranks import Ranks
        from dalle_ds.parallel.failure_detection import RankWatch
        dist.init_process_group("gloo")
        ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"))
        with RankWatch(ranks, timeout=600, grace=1) as watch:
            watch.before_exit = lambda: print("told", flush=True)
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGABRT)
            time.sleep(600)
    """
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=launching.environment({**job, "RANK": str(rank)}),
            text=True,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    out, err = ranks[0].communicate(timeout=240)  # less than torch's own timeout of ten minutes
    assert ranks[1].wait() == -signal.SIGABRT
    assert (ranks[0].returncode, out) == (75, "told\n")
    assert f"error on rank 0: rank 1 (process {ranks[1].pid}) was killed by SIGABRT" in err


@pytest.fixture(scope="module")
def diverged(home: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The run resumes with a weight in its last residual block that exceeds fp16's range."""
    newest = checkpoints(home)[-1]
    key = "weights/layers.1.mlp.branch.expand.weight"
    commit = json.loads((newest / "checkpoint.json").read_text())
    for file in (newest / commit["attempt"]).glob("state-*.safetensors"):
        with safe_open(file, "pt") as opened:
            metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tensors[key][:] = 1e6
        save_file(tensors, file, metadata)
        digest = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        commit["files"][f"{commit['attempt']}/{file.name}"] = digest
    edit_json(newest / "checkpoint.json", files=commit["files"])
    update = int(newest.name.removeprefix("update_")) + 3
    done = launching.run(command("failure.nonfinite_losses=3"), home, env(home))
    assert checkpoints(home)[-1] == newest, "states without a finite loss are not kept"
    return done, home / "run" / "diagnosis" / f"update_{update:08d}"


def test_a_run_without_finite_losses_stops_and_names_the_block(
    diverged: tuple[subprocess.CompletedProcess[str], Path], home: Path
) -> None:
    done, folder = diverged
    assert done.returncode == 2
    assert "no finite loss in 3 consecutive updates (failure.nonfinite_losses)." in done.stderr
    assert "(failure.nonfinite_losses). First non-finite value: layers.1.mlp" in done.stderr
    assert done.stderr.count("First non-finite value") == 1, "once, not from each rank"
    assert f"dalle-ds diagnose {folder.relative_to(home)}" in done.stderr
    about = json.loads((folder / "diagnosis.json").read_text())
    assert about["event"] == "layers.1.mlp, forward pass" and about["image_loss"] == "NaN"
    blocks = {block["name"]: block for block in about["blocks"]}
    assert list(blocks) == ["embed", *(f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")), "heads"]
    assert blocks["layers.1.mlp"]["weights"] == {"largest": 1e6, "is_finite": True}
    assert blocks["layers.1.mlp"]["ranks"] == [0, 1] and blocks["layers.1.mlp"]["gradient_scale_log2"] == pytest.approx(
        12.5, abs=0.05
    )
    assert [block["forward"]["is_finite"] for block in about["blocks"]] == [True, True, True, True, False, False]
    keys = {sample["key"] for sample in about["samples"]}
    assert len(keys) == GLOBAL_BATCH and all(key.startswith("train-") for key in keys)
    run = tracked(home)
    assert run.info.status == "FAILED"
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "diagnosis")] == ["diagnosis/diagnosis.json"]
    assert any("diagnosis" in file.path for file in client.list_artifacts(run.info.run_id, "images"))


def test_a_diagnosis_is_replayed_on_another_number_of_ranks_and_in_another_format(
    diverged: tuple[subprocess.CompletedProcess[str], Path], home: Path, tmp_path: Path
) -> None:
    _, folder = diverged
    moved = shutil.move(folder, tmp_path / "diagnosis")  # a diagnosis needs no other files, not even the data
    shutil.rmtree(home / "runs")
    before = {path: path.stat().st_mtime_ns for path in [*home.rglob("*"), *moved.rglob("*")]}
    replays = [
        launching.run([sys.executable, "-m", "dalle_ds.cli", "diagnose", str(moved), "--json", *more], home, env(home))
        for more in ([], ["deepspeed_config=ds_configs/zero3_fp32.json"])
    ]
    assert [replay.returncode for replay in replays] == [0, 0], replays[0].stderr + replays[1].stderr
    in_fp16, in_fp32 = (launching.last_json(replay.stdout) for replay in replays)
    assert in_fp16["reproduced"] and in_fp16["event_in_replay"] == "layers.1.mlp, forward pass"
    assert re.search(r"\nlayers\.1\.mlp +2\^12\.5 +2\^19\.9 +\S+! ", replays[0].stderr)
    assert not in_fp32["reproduced"] and in_fp32["event_in_replay"] == "none"
    assert {path: path.stat().st_mtime_ns for path in [*home.rglob("*"), *moved.rglob("*")]} == before
