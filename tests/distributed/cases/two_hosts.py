"""Simulate two hosts of one core each on one machine: namespaces for network, processes, host name and mounts, with an sshd in
each.

All processes on a host end with the host, and a host ends with the process that created it. The hosts share files, as on a
cluster. Nothing outside the namespaces is modified: keys, configuration and host names are in a folder of the test.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.support import launching

NETWORK = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
SYSTEM = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")

# Runs as the first process of the host. sshd must be started by its full path. /etc/ssh is replaced by the test's, ~/.ssh is
# ignored.
START = """
set -e
hostname {name}
ip link set lo up
mount --bind {folder}/ssh /etc/ssh
mount --bind {folder}/hosts.{name} /etc/hosts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
exec "$(command -v sshd)" -D -E {folder}/sshd.{name}.log
"""

SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""

SSH_CONFIG = """
Host *
  IdentityFile /etc/ssh/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

SLURM_CONFIG = """
ClusterName=test
SlurmctldHost=node-a({NETWORK[node-a]})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=node-a NodeAddr={NETWORK[node-a]} CPUs=1
NodeName=node-b NodeAddr={NETWORK[node-b]} CPUs=1
PartitionName=all Nodes=ALL Default=YES
"""


def why_not() -> str:
    """Return why this machine can't simulate two hosts. If it can, return an empty string."""
    if os.geteuid() != 0:
        return "namespaces with networks between them need root"
    if missing := missing_tools("unshare", "nsenter", "setpriv", "taskset", "ip", "ssh", "sshd", "pdsh"):
        return f"not installed: {missing} (Debian: openssh-server pdsh iproute2)"
    if len(os.sched_getaffinity(0)) < 2:
        return "one core only"
    command = ["unshare", *NAMESPACES, "--fork", "ip", "link", "set", "lo", "up"]
    tried = subprocess.run(command, env=SYSTEM, capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def missing_tools(*tools: str) -> str:
    """Comma-separated names of the tools that are not installed."""
    return ", ".join(tool for tool in tools if not shutil.which(tool, path=SYSTEM["PATH"]))


@dataclass(frozen=True)
class Host:
    """One of the two simulated hosts."""

    name: str
    first: psutil.Process
    """Process 1 of the host, with its process id outside the namespace."""

    def inside(self, command: list[str], cwd: Path) -> list[str]:
        """Wrap `command` so that it runs on this host, in the folder `cwd`."""
        return ["nsenter", "--target", str(self.first.pid), *NAMESPACES, "--", "env", f"--chdir={cwd}", *command]

    def run(self, *command: str) -> str:
        """Run a short command on this host. Returns its stdout."""
        inside = self.inside(list(command), Path("/"))
        return subprocess.run(inside, env=SYSTEM, check=True, capture_output=True, text=True).stdout

    def answers(self, *command: str) -> str:
        """Like `run`, but returns an empty string if the command fails."""
        try:
            return self.run(*command).strip()
        except subprocess.CalledProcessError:
            return ""

    def processes(self) -> list[psutil.Process]:
        """All processes that run on this host now, except for its first process."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if process != self.first and _namespace(process.pid) == _namespace(self.first.pid):
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Training processes of any launcher, by rank."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                names = process.environ()
                rank = names.get("RANK") or names.get("OMPI_COMM_WORLD_RANK") or names.get("SLURM_PROCID")
                if rank is not None and any(part.endswith("train_prior.sh") for part in process.cmdline()[2:3]):
                    found[int(rank)] = process
        return found


@contextmanager
def two_hosts(folder: Path) -> Iterator[dict[str, Host]]:
    """Two running hosts by name, which can reach each other by ssh.
    When the context ends, the hosts and all their processes end."""
    ssh = folder / "ssh"
    ssh.mkdir()
    (ssh / "sshd_config").write_text(SSHD_CONFIG)
    (ssh / "ssh_config").write_text(SSH_CONFIG)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
    others = "".join(f"{address} {name}\n" for name, address in NETWORK.items())
    holders, hosts = [], {}
    try:
        for core, name in zip(sorted(os.sched_getaffinity(0)), NETWORK, strict=False):
            # as on Debian, a machine's own name is a loopback address
            (folder / f"hosts.{name}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            start = ["bash", "-c", START.format(name=name, folder=folder)]
            unshare = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
            pinned = ["setpriv", "--pdeathsig", "KILL", "taskset", "-c", str(core)]
            holders.append(subprocess.Popen([*pinned, *unshare, *start], env=SYSTEM))
            holder = psutil.Process(holders[-1].pid)
            launching.wait_for(holder.children, f"first process of {name}", timeout=30)
            hosts[name] = Host(name, holder.children()[0])
        _connect(*(host.first.pid for host in hosts.values()))
        for name in NETWORK:
            launching.wait_for(partial(hosts["node-a"].answers, "ssh", name, "hostname"), f"sshd of {name}", timeout=30)
        yield hosts
    finally:
        for host in hosts.values():
            host.first.kill()
        for holder in holders:
            holder.kill()
            holder.wait()


def start_slurm(hosts: dict[str, Host], folder: Path) -> dict[str, str]:
    """Start a Slurm cluster on the two hosts. Returns the environment variables that Slurm's commands need."""
    config = folder / "slurm.conf"
    config.write_text(SLURM_CONFIG.format(folder=folder, NETWORK=NETWORK))
    environment = {"SLURM_CONF": str(config)}
    hosts["node-a"].run("env", f"SLURM_CONF={config}", "slurmctld")
    for host in hosts.values():
        host.run("env", f"SLURM_CONF={config}", "slurmd")
    idle = ["env", f"SLURM_CONF={config}", "sinfo", "--noheader", "--format=%D", "--states=idle"]
    launching.wait_for(lambda: hosts["node-a"].answers(*idle) == "2", "idle nodes in Slurm", timeout=30)
    return environment


def _connect(first: int, second: int) -> None:
    ends = dict(zip((first, second), NETWORK.values(), strict=True))
    _call("ip", "link", "add", "eth0", "netns", str(first), "type", "veth", "peer", "name", "eth0", "netns", str(second))
    for pid, address in ends.items():
        inside = ("nsenter", "--target", str(pid), "--net", "ip")
        _call(*inside, "address", "add", f"{address}/24", "dev", "eth0")
        _call(*inside, "link", "set", "eth0", "up")


def _call(*command: str) -> None:
    subprocess.run(command, env=SYSTEM, check=True)


def _namespace(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/pid").readlink()
