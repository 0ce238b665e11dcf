"""Detect lost ranks: end the whole job with a message that names the lost rank and the cause, instead of waiting forever."""

import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from signal import Signals
from types import TracebackType

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dalle_ds.console import print_error
from dalle_ds.errors import RankLost, UserError
from dalle_ds.parallel.launch import stopped_siblings
from dalle_ds.parallel.ranks import Ranks

_POLL_S = 2.0
_TIMEOUTS = ("Timed out waiting", "Application timeout", "operation timeout")  # two messages of gloo, one of NCCL
_NOTE = "dalle_ds/lost"  # key in the job's store: why the job ends, written by the first rank that knows


def limit_waiting(seconds: float) -> None:
    """Set the timeout of all process groups that exist now. A collective that waits longer for another rank raises an error.

    Groups created without a timeout, such as ZeRO's, have torch's default timeout and not that of the default group.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def say(ranks: Ranks, error: UserError) -> None:
    """Print the error on stderr, once. If several ranks raise the same error, only the first of them prints it."""
    if error.is_said:
        return
    error.is_said, is_first = True, True
    if ranks.world_size > 1:
        with suppress(RuntimeError):  # the store may be gone with rank 0
            is_first = distributed_c10d._get_default_store().add(f"dalle_ds/said/{error}", 1) == 1
    if is_first:
        where = f" on rank {ranks.rank}" if ranks.world_size > 1 else ""
        print_error(f"error{where}: {error}")


class RankWatch:
    """Context manager that ends this process when another rank is lost.

    If another rank makes a collective fail within the context, it raises a RankLost that names the rank and what happened to
    it. A GPU may wait for a dead rank until the timeout. So if no error has been raised `grace` seconds after a rank was lost,
    the process is ended.

    The processes of this machine's ranks are watched directly. Ranks of other machines write a key into the job's store.
    """

    def __init__(self, ranks: Ranks, timeout: float, grace: float = 20.0) -> None:
        """`timeout` is that of collectives, in seconds. `grace` is how long to wait for an error after a rank was lost."""
        self._ranks, self._timeout, self._grace = ranks, timeout, grace
        self.before_exit: Callable[[], object] = lambda: None
        """Called before the watch ends the process."""
        self._done, self._known = threading.Event(), threading.Event()
        self._reason = ""

    def __enter__(self) -> "RankWatch":
        limit_waiting(self._timeout)
        if self._ranks.world_size > 1:
            self._store = distributed_c10d._get_default_store()
            # Process ids are only valid on one machine and in one container. Siblings share the parent: the launcher.
            namespace = Path("/proc/self/ns/pid")
            place = (os.uname().nodename, str(namespace.readlink()) if namespace.exists() else "", os.getppid())
            try:
                found = self._ranks.gather_objects((place, os.getpid()))
            except Exception as error:
                if not _is_of_a_collective(error):
                    raise
                stopped = stopped_siblings()
                raise _rank_lost(
                    f"no answer from another rank at the start{f', stopped: {stopped}' if stopped else ''}: "
                    + str(error).partition("\n")[0]
                ) from error
            self._siblings = {pid: rank for rank, (where, pid) in enumerate(found) if where == place and pid != os.getpid()}
            threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_caused_by_others = self._ranks.world_size > 1 and isinstance(error, Exception) and _is_of_a_collective(error)
        lost = _rank_lost(self._cause(error)) if is_caused_by_others else None
        self._done.set()
        if lost is not None:
            say(self._ranks, lost)
            raise lost from error
        if self._ranks.world_size > 1 and isinstance(error, Exception):
            self._tell_others(f"rank {self._ranks.rank} failed: {type(error).__name__}: {error}")
            if isinstance(error, UserError):  # print it now: the launcher may soon kill this rank
                say(self._ranks, error)

    def _cause(self, error: Exception) -> str:
        """Find out why a collective failed, and inform the other ranks."""
        if any(text in str(error) for text in _TIMEOUTS):
            stopped = [f"rank {rank} (process {pid})" for pid, rank in self._siblings.items() if _is_stopped(pid)]
            reason = f"no answer from another rank within {self._timeout:g} s (failure.collective_timeout)"
            reason += f", stopped: {', '.join(stopped)}" if stopped else ""
        else:
            self._known.wait(5 * _POLL_S)  # a connection breaks slightly before the end of its process is visible
            reason = self._reason or f"lost the connection to another rank: {str(error).splitlines()[0]}"
        self._tell_others(reason)
        return reason

    def _watch(self) -> None:
        poller, processes = select.poll(), {}
        for pid, rank in self._siblings.items() if hasattr(os, "pidfd_open") else ():  # Linux only
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._found(f"rank {rank} (process {pid}) has ended")
                continue
            processes[descriptor] = (rank, pid)
            poller.register(descriptor, select.POLLIN)
        store_is_gone = False
        while True:
            ended = poller.poll(_POLL_S * 1000)
            if self._done.is_set():  # from now on other ranks and the store may end normally
                break
            for descriptor, _ in ended:
                poller.unregister(descriptor)
                rank, pid = processes[descriptor]
                how = _how_it_ended(pid)
                if how is not None:
                    self._found(f"rank {rank} (process {pid}) {how}")
            try:
                note = self._note()
            except RuntimeError:
                # report it only the second time: a message about the end of a sibling is more specific
                note = "no answer from the process that hosts the job's store, rank 0 or torchrun" if store_is_gone else None
                store_is_gone = True
            if note is not None:
                self._found(note)
        for descriptor in processes:
            os.close(descriptor)

    def _found(self, reason: str) -> None:
        if self._known.is_set():
            return
        with suppress(RuntimeError):
            reason = self._note() or reason  # the note of a failed rank is more specific than its exit code
        self._reason = reason
        self._known.set()
        self._tell_others(reason)
        if not self._done.wait(self._grace):
            say(self._ranks, _rank_lost(reason))
            self.before_exit()
            os._exit(RankLost.exit_code)

    def _note(self) -> str | None:
        return self._store.get(_NOTE).decode() if self._store.check([_NOTE]) else None

    def _tell_others(self, reason: str) -> None:
        with suppress(RuntimeError):  # the store may be gone with rank 0; then the other ranks notice that themselves
            if self._note() is None:
                self._store.set(_NOTE, reason)


def _rank_lost(reason: str) -> RankLost:
    return RankLost(f"{reason}; run the same command again to resume from the last checkpoint")


def _is_of_a_collective(error: Exception) -> bool:
    by_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", *_TIMEOUTS))
    return by_gloo or isinstance(error, dist.DistError)


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _how_it_ended(pid: int) -> str | None:
    """How a process has ended. None if it exited with 0 or after SIGTERM. Its launcher may have waited for it already."""
    try:
        # field 52 is the status as wait() returns it; field 2 is a name in brackets that may contain any character
        code = os.waitstatus_to_exitcode(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[49]))
    except (FileNotFoundError, ProcessLookupError):
        return "has ended"
    if code in (0, 128 + Signals.SIGTERM):
        return None
    return f"ended with exit code {code}" if code > 0 else f"was killed by {Signals(-code).name}"
