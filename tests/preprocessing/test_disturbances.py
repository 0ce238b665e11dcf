"""Encode under disturbance: killed workers, two concurrent runs, a killed S3 server. The result equals the undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dalle_ds.data.manifest import done_shards
from dalle_ds.data.tokens.dataset_files import load_manifest
from dalle_ds.errors import StoreUnreachable
from dalle_ds.storage import objects
from preprocessing.configs import IngestConfig, StatsConfig, TokenizerConfig, VerifyConfig
from preprocessing.executors import local
from preprocessing.stages import encode, ingest, stats, tokenizer, verify
from tests.conftest import S3
from tests.preprocessing.conftest import N_IMAGES, N_SHARDS, World

Check = Callable[[str], bool]
N_KILLS = 4  # two per run: three in a row without a finished shard would end a run


def start_encode(world: World, out: str, workers: int = 1) -> subprocess.Popen[str]:
    """Start the command as a user would."""
    values = {
        "raw": world.raw,
        "dvae": world.dvae,
        "tokenizer": world.tokenizer,
        "out": out,
        "workers": workers,
        "validation_fraction": 0.2,
        "block_samples": 3,
        "batch": 4,
        "device": "cpu",
    }
    words = [f"{name}={value}" for name, value in values.items()]
    # A SIGKILL leaves files in TMPDIR; they are deleted with the test's own folder.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(world.images.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "preprocessing", "encode", "--json", *words],
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr[-3000:]
    return json.loads(stdout.splitlines()[-1])


def wait_for_shards(root: str, count: int, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while len(done_shards(root)) < count:
        assert is_alive(), "it ended before it was disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def problems(root: str) -> int:
    return verify.run(VerifyConfig(root=root, workers=1)).summary["n_problems"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_finished_by_the_next(
    world: World, tmp_path: Path, is_undisturbed: Check, stop: signal.Signals
) -> None:
    out = str(tmp_path / "tokens")
    process = start_encode(world, out, workers=2)
    wait_for_shards(out, 1, lambda: process.poll() is None)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == (-9 if stop == signal.SIGKILL else 143), stderr[-2000:]
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "workers outlived their parent"
    n_done = len(done_shards(out))
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    assert problems(out) == 1  # only the merged manifest is missing: committed shards are complete
    assert encode.run(world.config(out)).summary["shards_made_now"] == N_SHARDS - n_done
    assert is_undisturbed(out)
    assert problems(out) == 0


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    workers = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # the process has ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def test_workers_of_two_runs_are_killed_at_random(world: World, tmp_path: Path, is_undisturbed: Check) -> None:
    """Two commands encode into one output. After each new shard, a worker of one command is killed, alternating."""
    out, draw = str(tmp_path / "tokens"), random.Random(0)
    processes = [start_encode(world, out, workers=2) for _ in range(2)]
    n_killed = n_seen = 0
    while n_killed < N_KILLS:
        wait_for_shards(out, n_seen + 1, lambda: any(process.poll() is None for process in processes))
        n_seen = len(done_shards(out))
        process = processes[n_killed % 2]
        assert process.poll() is None
        workers = workers_of(process)
        if workers:
            draw.choice(workers).kill()
            n_killed += 1
    for process in processes:
        finish(process)
    assert is_undisturbed(out)
    assert problems(out) == 0


def run_two(world: World, out: str) -> None:
    outcomes = []
    threads = [threading.Thread(target=lambda: outcomes.append(encode.run(world.config(out)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.is_complete for outcome in outcomes] == [True, True]


def test_two_runs_at_once_are_harmless(world: World, any_root: str, is_undisturbed: Check) -> None:
    run_two(world, any_root)
    assert is_undisturbed(any_root)
    report = verify.run(VerifyConfig(root=any_root, workers=1)).summary
    assert (report["n_problems"], report["orphans"], report["samples"]) == (0, 0, N_IMAGES)


@pytest.mark.s3
def test_the_whole_pipeline_on_s3(world: World, s3: S3, is_undisturbed: Check) -> None:
    raw, model, out = f"{s3.url}/raw", f"{s3.url}/tokenizer.model", f"{s3.url}/tokens"
    images = f"{s3.url}/images"
    for file in sorted(world.images.iterdir()):
        objects.put_file(file, objects.join(images, file.name))
    ingest.run(IngestConfig(images=images, out=raw, samples_per_shard=N_IMAGES // N_SHARDS, workers=1))
    tokenizer.run(TokenizerConfig(raw=raw, out=model, vocab_size=400, validation_fraction=0.2))
    objects.put_file(world.dvae, f"{s3.url}/dvae.safetensors")
    config = world.config(out, raw=raw, tokenizer=model, dvae=f"{s3.url}/dvae.safetensors")
    outcome = encode.run(config.model_copy(update={"workers": 2}))  # spawned workers, each with its own connections
    assert outcome.is_complete
    assert is_undisturbed(out)
    assert problems(out) == 0
    assert stats.run(StatsConfig(root=out)).summary["inputs"] == N_IMAGES
    assert encode.run(config).summary["shards_made_now"] == 0


@pytest.mark.s3
def test_the_server_is_killed_in_the_middle(world: World, s3: S3, is_undisturbed: Check) -> None:
    """Kill the server with SIGKILL while shards are being written: the run waits for the server and succeeds."""
    out = f"{s3.url}/tokens"
    process = start_encode(world, out)
    wait_for_shards(out, 3, lambda: process.poll() is None)
    s3.server.kill()
    time.sleep(2)
    assert process.poll() is None
    s3.server.start()
    finish(process)
    assert is_undisturbed(out)
    assert problems(out) == 0
    assert load_manifest(out).complete


@pytest.mark.s3
def test_an_outage_longer_than_the_retries_pauses_the_run(
    world: World, s3: S3, is_undisturbed: Check, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = f"{s3.url}/tokens"

    def outage() -> None:
        s3.server.kill()
        threading.Timer(2, s3.server.start).start()

    monkeypatch.setattr(local, "progress", killing_progress(outage, after=3))
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "0.3")
    assert encode.run(world.config(out)).is_complete
    assert "the store has been away" in caplog.text
    assert is_undisturbed(out)


@pytest.mark.s3
def test_a_server_that_stays_away_ends_the_run_and_a_rerun_completes(
    world: World, s3: S3, is_undisturbed: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{s3.url}/tokens"
    monkeypatch.setattr(local, "progress", killing_progress(lambda: s3.server.kill(), after=N_SHARDS - 2))
    monkeypatch.setenv("DALLE_DS_RETRY_SECONDS", "0.5")
    monkeypatch.setenv("DALLE_DS_OUTAGE_SECONDS", "1")
    with pytest.raises(StoreUnreachable, match=r"cannot .* s3://.*: tried for 0 s, last error:"):
        encode.run(world.config(out))
    monkeypatch.undo()
    for name, value in s3.server.environment.items():
        monkeypatch.setenv(name, value)
    s3.server.start()
    assert len(done_shards(out)) == N_SHARDS - 2
    assert encode.run(world.config(out)).summary["shards_made_now"] == 2
    assert is_undisturbed(out)
    assert problems(out) == 0


def killing_progress(kill: Callable[[], None], after: int) -> Callable[..., object]:
    """Replaces `local.progress`. The bar is updated after each shard, so it runs code exactly between two shards."""

    class Bar:
        n = 0

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, _: int) -> None:
            self.n += 1
            if self.n == after:
                kill()

    return lambda **_: Bar()
