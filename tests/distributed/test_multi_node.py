"""One real job on two hosts, started by ssh and pdsh, Open MPI and Slurm. It is stopped, killed and resumed, and leaves no
process behind.

The tests share one run: each test resumes it where the previous one left it. A test that runs alone starts the run itself.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dalle_ds.training.preemption import LAUNCHER_VARIABLE
from tests.data.token_sets import make_token_set
from tests.distributed.cases.two_hosts import Host, missing_tools, start_slurm, two_hosts, why_not
from tests.support import launching

pytestmark = pytest.mark.launch

Hosts = dict[str, Host]

SMALL = [
    "model.n_layers=2",
    "model.n_heads=1",
    "global_batch=16",
    "micro_batch=4",
    "validation.every=100000",
    "validation.samples=16",
    "tracking.every=1",
    "learning_rate.warmup_updates=2",
    "learning_rate.shape=constant",
]
SECRET = 'a $key with "signs"'
NO_SERVER = "http://127.0.0.1:9"
# Debian hosts resolve their own names to a loopback address, on which gloo would listen
PASSED_ON = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "DALLE_DS_RETRY_SECONDS": "77",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    "MLFLOW_TRACKING_URI": NO_SERVER,
    "LD_LIBRARY_PATH": "/opt/amazon/efa/lib",
    "FI_PROVIDER": "efa",
    "UCX_TLS": "rc",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "HF_HOME": "/shared/hf",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "http_proxy": "",
    "no_proxy": "node-a",
}
NOT_PASSED_ON = {"CUDA_VISIBLE_DEVICES": "7", "NVIDIA_VISIBLE_DEVICES": "7", "OF_NOBODY": "1"}

# Python runs this at the start of each process. When the process ends, it writes its environment to a file per host and rank.
NOTE_ENVIRONMENT = """
import atexit, json, os, pathlib, sys
def note():
    if "RANK" in os.environ and sys.argv[0].endswith("train_prior.sh"):
        name = f"environment.{os.uname().nodename}.{os.environ['RANK']}.json"
        pathlib.Path(__file__).with_name(name).write_text(json.dumps(dict(os.environ)))
atexit.register(note)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which jobs are started. Both hosts share it."""
    home = tmp_path_factory.mktemp("home")
    make_token_set(home / "tokens", n_samples=96, n_validation=32)
    (home / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(launching.QUICK_START.read_text() + NOTE_ENVIRONMENT)
    return home


@pytest.fixture(scope="module")
def env(home: Path) -> dict[str, str]:
    ours = {"PYTHONPATH": f"{launching.ROOT}:{home / 'site'}", LAUNCHER_VARIABLE: str(os.getpid())}
    return {**PASSED_ON, **NOT_PASSED_ON, **ours}


def arguments(home: Path, folder: str = "run", **overrides: object) -> list[str]:
    mine = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    given = [*SMALL, f"data.dataset={home / 'tokens'}", f"folder={home / folder}", *mine]
    return [*launching.TINY, *launching.words(*given)]


def newest(home: Path, folder: str = "run") -> int:
    """Update number of the newest checkpoint. 0 if there is no checkpoint."""
    found = (home / folder / "checkpoints").glob("update_*/checkpoint.json")
    return max((json.loads(path.read_text())["update"] for path in found), default=0)


def has_trained(home: Path) -> bool:
    """Whether the run has made an update. Its metrics are in the spool, since there is no MLflow server."""
    return any('"loss/train/total"' in path.read_text() for path in (home / "run" / "mlflow_spool").glob("values/*.jsonl"))


@contextmanager
def started(hosts: Hosts, command: list[str], home: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Start a command on node-a. When the context ends, kill all processes that are left on the hosts."""
    try:
        with launching.started(hosts["node-a"].inside(command, home), home, env) as process:
            yield process
    finally:
        kill_all(hosts)


def kill_all(hosts: Hosts) -> None:
    for left in left_on(hosts):
        with suppress(psutil.NoSuchProcess):
            left.kill()


def left_on(hosts: Hosts) -> list[psutil.Process]:
    return [process for host in hosts.values() for process in host.processes()]


def wait_until_all_ended(hosts: Hosts) -> None:
    launching.wait_for(lambda: not left_on(hosts), "end of everything on both hosts", timeout=900)


def require_one_rank_each(hosts: Hosts) -> None:
    assert {name: list(host.ranks()) for name, host in hosts.items()} == {"node-a": [0], "node-b": [1]}


def state_of(home: Path, folder: str, update: int) -> dict[str, bytes]:
    files = (home / folder / "checkpoints" / f"update_{update:08}").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


def test_pdsh_trains_as_one_host_does_passes_the_environment_on_and_ends_by_ctrl_c(
    hosts: Hosts, home: Path, env: dict[str, str]
) -> None:
    command = ["bash", launching.TRAIN_PRIOR, *arguments(home, updates=100000)]
    with started(hosts, command, home, {**env, "DS_LAUNCH_ARGS": "--hostfile hosts"}) as process:
        launching.wait_for(lambda: has_trained(home), "first update", process=process)
        require_one_rank_each(hosts)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        out, err = process.communicate(timeout=900)
        wait_until_all_ended(hosts)
    assert (update := newest(home)) > 0, f"nothing was saved:\n{out[-2000:]}\n{err[-4000:]}"
    for host, rank in (("node-a", 0), ("node-b", 1)):
        found = json.loads((home / "site" / f"environment.{host}.{rank}.json").read_text())
        assert found["WORLD_SIZE"] == "2"
        assert {name: found.get(name) for name in PASSED_ON} == PASSED_ON
        assert not any(found.get(name) == value for name, value in NOT_PASSED_ON.items()), "each host's own"
        assert found["PATH"].startswith(str(Path(sys.executable).parent)), "the virtual environment of the launching host"
        assert LAUNCHER_VARIABLE not in found, "a process number means nothing on another host"
    assert SECRET not in out + err and "AWS_SECRET" not in out + err
    assert (home / ".environment").stat().st_mode & 0o777 == 0o600
    # the same updates on two ranks of one host
    two_cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    command = [*launching.deepspeed(2), launching.TRAIN_PRIOR, *arguments(home, "one_host", updates=update)]
    done = launching.run(["taskset", "-c", two_cores, *command], home, env)
    assert done.returncode == 0 and newest(home, "one_host") == update, done.stdout[-2000:] + done.stderr[-4000:]
    assert state_of(home, "run", update) == state_of(home, "one_host", update), "weights, moments and losses, bit by bit"


def test_a_killed_pdsh_is_never_exit_code_0(hosts: Hosts, home: Path, env: dict[str, str]) -> None:
    command = ["bash", launching.TRAIN_PRIOR, *arguments(home, "cut", updates=100000)]
    with started(hosts, command, home, {**env, "DS_LAUNCH_ARGS": "--hostfile hosts"}) as process:
        launching.wait_for(lambda: hosts["node-b"].ranks(), "rank on node-b", process=process)
        (pdsh,) = (child for child in launching.family(process.pid) if Path(child.cmdline()[0]).name == "pdsh")
        pdsh.kill()
        process.wait(timeout=240)
        kill_all(hosts)  # ssh outlives pdsh
        launching.kill_tree(process.pid)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 143 and "was killed by SIGKILL: the job is not done" in err


def test_a_rank_that_dies_on_the_far_host_ends_the_job_on_both(hosts: Hosts, home: Path, env: dict[str, str]) -> None:
    (home / "environment").write_text("".join(f"{name}={value}\n" for name, value in PASSED_ON.items()))
    before = newest(home)
    command = ["deepspeed", "--hostfile", "hosts", launching.TRAIN_PRIOR, "--environment", "environment"]
    command += arguments(home, updates=100000, checkpoint__every=1)
    with started(hosts, command, home, {"PYTHONPATH": env["PYTHONPATH"]}) as process:
        launching.wait_for(lambda: newest(home) > before, "checkpoint", process=process)
        hosts["node-b"].ranks()[1].kill()
        out, err = process.communicate(timeout=240)  # less than torch's own timeout of ten minutes
        wait_until_all_ended(hosts)
    assert process.returncode != 0
    assert "lost the connection to another rank" in out + err


@pytest.mark.skipif(bool(missing_tools("mpirun", "ompi_info")), reason="not installed: Open MPI (Debian: openmpi-bin)")
def test_open_mpi_goes_on(hosts: Hosts, home: Path, env: dict[str, str]) -> None:
    before = newest(home)
    options = "--allow-run-as-root -x MASTER_ADDR=node-a -x AWS_SECRET_ACCESS_KEY -x GLOO_SOCKET_IFNAME"
    launcher = ["deepspeed", "--hostfile", "hosts", "--launcher", "openmpi", "--launcher_args", options]
    command = [*launcher, launching.TRAIN_PRIOR, *arguments(home, updates=before + 2), "--json"]
    with started(hosts, command, home, env) as process:
        launching.wait_for(lambda: hosts["node-b"].ranks(), "rank on node-b", process=process)
        out, err = process.communicate(timeout=900)
        wait_until_all_ended(hosts)
    assert process.returncode == 0, err[-4000:]
    summary = launching.last_json(out)
    assert (summary["resumed_at"], summary["updates"]) == (before, before + 2)
    found = json.loads((home / "site" / "environment.node-b.1.json").read_text())
    assert (found["WORLD_SIZE"], found["LOCAL_RANK"], found["AWS_SECRET_ACCESS_KEY"]) == ("2", "0", SECRET)


# Stands in for a rank without training: a process below its node's launcher, which ssh has started.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[2:]])"
RANK = """
import pathlib, time
from dalle_ds.training.preemption import StopFlag
with StopFlag(poll_seconds=0.1) as stop:
    pathlib.Path("watching").touch()
    while not stop.requested:
        time.sleep(0.1)
pathlib.Path("reason").write_text(stop.reason)
"""


def test_a_rank_stops_when_its_ssh_session_is_gone(hosts: Hosts, tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    remote = f"cd {tmp_path} && PYTHONPATH={launching.ROOT} {sys.executable} launcher.py deepspeed.launcher.launch rank.py"
    with started(hosts, ["ssh", "node-b", remote], tmp_path, env) as process:
        launching.wait_for((tmp_path / "watching").exists, "rank", process=process)
        launching.kill_tree(process.pid)
        wait_until_all_ended(hosts)
    assert "has died" in (tmp_path / "reason").read_text()


@pytest.mark.skipif(
    bool(missing_tools("slurmctld", "slurmd", "srun")), reason="not installed: Slurm (Debian: slurmctld slurmd slurm-client)"
)
def test_slurm_job_saves_when_preempted_queues_itself_again_and_goes_on(
    hosts: Hosts, home: Path, env: dict[str, str], tmp_path: Path
) -> None:
    """Preemption and an approaching time limit send the same signal to a job's steps as `scancel --signal=TERM`."""
    slurm = start_slurm(hosts, tmp_path)

    def call(*command: str) -> str:
        done = launching.run(hosts["node-a"].inside([*command], launching.ROOT), home, {**env, **slurm})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state() -> str:
        return call("squeue", "--noheader", "--format=%T %r")

    before = newest(home)
    log = tmp_path / "job.log"
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", f"--output={log}"]
    script = ["launchers/slurm/train_prior.sbatch", *arguments(home, updates=100000, checkpoint__every=1)]
    job = call("sbatch", *options, *script)
    try:
        launching.wait_for(lambda: newest(home) > before, "checkpoint")
        require_one_rank_each(hosts)
        call("scancel", "--signal=TERM", job)
        launching.wait_for(lambda: state() == "PENDING BeginTime", "the job in the queue again", timeout=900)
        assert "exit code 143, requeued" in log.read_text()
        assert not any(host.ranks() for host in hosts.values())
        saved = newest(home)
        call("scontrol", "update", f"jobid={job}", "StartTime=now+3")  # not within the second in which the first start ended
        launching.wait_for(lambda: newest(home) > saved, "checkpoint of the second start")
        require_one_rank_each(hosts)
        call("scancel", job)
        launching.wait_for(lambda: state() == "", "end of the job", timeout=900)
        launching.wait_for(lambda: not any(host.ranks() for host in hosts.values()), "end of the ranks", timeout=900)
    finally:
        kill_all(hosts)
