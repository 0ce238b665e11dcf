"""Training through kills at random times: all losses and the last checkpoint are those of an undisturbed run."""

import json
import random
import sys
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest

from dalle_ds.storage.record import unseal
from tests.data.token_sets import make_token_set
from tests.support import launching
from tests.support.killing import everything, run_through_kills

pytestmark = pytest.mark.launch

NO_SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # so the spool keeps every record
SMALL = [
    "model.n_layers=2",
    "model.n_heads=1",
    "global_batch=4",
    "micro_batch=2",
    "checkpoint.every=3",
    "validation.every=6",
    "validation.samples=16",
    "tracking.every=1",
    "learning_rate.warmup_updates=2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_token_set(home / "runs" / "demo" / "tokens", n_samples=96, n_validation=16)
    return home


def command(folder: str, n_ranks: int, updates: int) -> list[str]:
    words = [*launching.TINY, *launching.words(*SMALL, f"updates={updates}", f"folder={folder}"), "--json"]
    launcher = launching.deepspeed(n_ranks) if n_ranks > 1 else [sys.executable, "-u"]
    return [*launcher, launching.TRAIN_PRIOR, *words]


def segments(run: Path) -> set[Path]:
    return set((run / "mlflow_spool" / "values").glob("*.jsonl"))


def losses_in(segment: Path) -> dict[tuple[int, str], float]:
    """Losses by update and name in the records of one start."""
    lines = segment.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]  # a kill may tear the last line
    return {
        (record["step"], name): value
        for record in records
        if record["kind"] == "metrics"
        for name, value in record["values"].items()
        if name.startswith("loss/")
    }


def losses(run: Path) -> dict[tuple[int, str], set[float]]:
    """All values of each loss at each update, of all starts."""
    found: dict[tuple[int, str], set[float]] = {}
    for segment in segments(run):
        for at, value in losses_in(segment).items():
            found.setdefault(at, set()).add(value)
    return found


def last_tensors(run: Path) -> dict[str, str]:
    """SHA-256 of the tensor files of the last checkpoint, by name."""
    commit = json.loads(max(run.glob("checkpoints/update_*/checkpoint.json")).read_text())
    return {Path(path).name: file["sha256"] for path, file in commit["files"].items() if path.endswith(".safetensors")}


def one_of_the_job(pid: int, draw: random.Random) -> Collection[psutil.Process]:
    """A rank, the node launcher, the command `deepspeed`, or everything."""
    family = launching.family(pid)
    launchers = [process for process in family if "deepspeed.launcher.launch" in " ".join(process.cmdline())]
    ranks = launching.ranks_of(pid)
    groups = [[ranks[0]], [ranks[1]], launchers, [psutil.Process(pid)], everything(pid, draw)]
    return draw.choice([group for group in groups if group])


@pytest.mark.parametrize(
    ("n_ranks", "n_kills", "updates"),
    [(1, 2, 18), pytest.param(1, 25, 60, marks=pytest.mark.long), pytest.param(2, 25, 60, marks=pytest.mark.long)],
)
def test_killed_at_random_is_the_undisturbed_run(home: Path, n_ranks: int, n_kills: int, updates: int) -> None:
    draw, killed, whole = random.Random(n_ranks), home / f"killed{n_ranks}-{n_kills}", home / f"whole{n_ranks}-{n_kills}"
    assert launching.run(command(whole.name, n_ranks, updates), home, NO_SERVER).returncode == 0
    starts: set[Path] = set()  # a segment of the spool for each start
    wanted = [draw.randint(1, 6)]

    def has_made_updates() -> bool:
        """Whether the start has made a random number of updates, of which three make a checkpoint."""
        return len({step for segment in segments(killed) - starts for step, _ in losses_in(segment)}) >= wanted[0]

    def remember() -> None:
        starts.update(segments(killed))
        wanted[0] = draw.randint(1, 6)

    done, n_killed = run_through_kills(
        command(killed.name, n_ranks, updates),
        home,
        n_kills,
        draw,
        seconds=0.5,
        has_begun=has_made_updates,
        choose=everything if n_ranks == 1 else one_of_the_job,
        after_kill=remember,
        extra_env=NO_SERVER,
    )
    assert n_killed >= min(2, n_kills), "it was faster than the kills"
    expected = losses(whole)
    assert losses(killed) == expected and all(len(values) == 1 for values in expected.values())
    assert last_tensors(killed) == last_tensors(whole) and len(last_tensors(whole)) > n_ranks
    summary = unseal((killed / "summary.json").read_bytes(), "summary.json")
    reference = unseal((whole / "summary.json").read_bytes(), "summary.json")
    for key in ("updates", "skipped_updates", "loss/validation/image", "loss/validation/text"):
        assert summary[key] == reference[key], key
    assert launching.last_json(done.stdout)["updates"] == updates
