"""Watch over the other ranks: a job ends as a whole, and says which rank was lost and how, where it would wait for ever."""

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
from dalle_ds.parallel.ranks import Ranks

_POLL_S = 2.0
_TIMEOUTS = ("Timed out waiting", "Application timeout", "operation timeout")  # as gloo (two ways) and NCCL put it
_NOTE = "dalle_ds/lost"  # in the job's store: why it ends, from the first rank that knows


def limit_waiting(seconds: float) -> None:
    """Collectives end with an error where another rank lets this one wait for so long, in all groups that there are by now.

    Groups made without a timeout, as ZeRO's are, have torch's own, whatever the default group's is.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def say(ranks: Ranks, error: UserError) -> None:
    """Show the message on stderr, once; what all ranks find out only from the first of them."""
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
    """Within its context, an error of a collective that another rank caused is raised as a RankLost that names the rank and
    what happened to it. Where no error comes (a GPU may wait for a dead rank until the timeout), the process is ended.

    Ranks of this machine are watched by their processes; those of others leave a note in the job's store.
    """

    def __init__(self, ranks: Ranks, timeout: float, grace: float = 20.0) -> None:
        """`timeout`: seconds of collectives. `grace`: seconds for an error to come once a rank is lost."""
        self._ranks, self._timeout, self._grace = ranks, timeout, grace
        self.before_exit: Callable[[], object] = lambda: None
        """Called where the process has to be ended."""
        self._done, self._known = threading.Event(), threading.Event()
        self._reason = ""

    def __enter__(self) -> "RankWatch":
        limit_waiting(self._timeout)
        if self._ranks.world_size > 1:
            self._store = distributed_c10d._get_default_store()
            # a process number means nothing on another machine or in another container; siblings have one launcher
            namespace = Path("/proc/self/ns/pid")
            place = (os.uname().nodename, str(namespace.readlink()) if namespace.exists() else "", os.getppid())
            found = self._ranks.gather_objects((place, os.getpid()))
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
            if isinstance(error, UserError):  # before anything that takes time: the launcher may kill this rank soon
                say(self._ranks, error)

    def _cause(self, error: Exception) -> str:
        """Why a collective failed."""
        if any(text in str(error) for text in _TIMEOUTS):
            stopped = [f"rank {rank} (process {pid})" for pid, rank in self._siblings.items() if _is_stopped(pid)]
            reason = f"no answer from another rank within {self._timeout:g} s (failure.collective_timeout)"
            reason += f", stopped: {', '.join(stopped)}" if stopped else ""
        else:
            self._known.wait(5 * _POLL_S)  # a connection breaks a moment before its process has ended
            reason = self._reason or f"lost the connection to another rank: {str(error).splitlines()[0]}"
        self._tell_others(reason)
        return reason

    def _watch(self) -> None:
        poller, processes = select.poll(), {}
        for pid, rank in self._siblings.items() if hasattr(os, "pidfd_open") else ():  # Linux has it
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
            if self._done.is_set():  # the others may end now, and the store with them
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
                # not at once: the end of a sibling says more
                note = "no answer from the process that keeps the job's store, rank 0 or torchrun" if store_is_gone else None
                store_is_gone = True
            if note is not None:
                self._found(note)
        for descriptor in processes:
            os.close(descriptor)

    def _found(self, reason: str) -> None:
        if self._known.is_set():
            return
        with suppress(RuntimeError):
            reason = self._note() or reason  # a rank that failed has said more than its exit code does
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
        with suppress(RuntimeError):  # the store may be gone with rank 0, which the others see as well
            if self._note() is None:
                self._store.set(_NOTE, reason)


def _rank_lost(reason: str) -> RankLost:
    return RankLost(f"{reason}; the same command goes on from the last checkpoint")


def _is_of_a_collective(error: Exception) -> bool:
    by_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/", *_TIMEOUTS))
    return by_gloo or isinstance(error, dist.DistError)


def _is_stopped(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _how_it_ended(pid: int) -> str | None:
    """Of a process that its launcher may have waited for already; None: by itself, or because it was asked to."""
    try:
        # field 52 is the status as wait() gives it; the second is a name in brackets, in which anything may stand
        code = os.waitstatus_to_exitcode(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[49]))
    except (FileNotFoundError, ProcessLookupError):
        return "has ended"
    if code in (0, 128 + Signals.SIGTERM):
        return None
    return f"ended with exit code {code}" if code > 0 else f"was killed by {Signals(-code).name}"
