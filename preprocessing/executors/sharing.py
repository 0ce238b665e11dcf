"""Which shard this machine takes next, when several machines fill one output.

A machine claims a shard before it works on it, by creating `claims/SHARD.GENERATION` below the output, which only one machine
can. It deletes its claim when the shard is committed. Claims save work; they decide nothing: if two machines work on one shard
after all, the commit of one of them wins.

Each machine begins with a part of the list that is its own, then takes the rest in a random order of its own, so that machines
rarely ask for the same shard. It lists the output only after it has lost some claims, and while it has nothing to do.

A dead machine leaves claims. Whoever has nothing else to do watches them, and takes over a claim that stays for longer than the
lease, by creating the next generation. The watcher measures this time itself, so clocks of machines are not compared. A
machine that starts again gets its earlier claims at once, because they contain its number.

A shard that failed leaves `claims/SHARD.failed.STATE.MACHINE`. After MAX_MACHINES of them no further machine of this run tries
the shard, and the last claim stays. A machine that starts deletes the failures that do not count for it: its own, those of a
shard or of settings that have changed since (STATE is a hash of both), and those older than FAILURE_SECONDS.
"""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from dalle_ds.data.manifest import done_shards, manifest_url
from dalle_ds.errors import UserError
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)

CLAIMS: Final = "claims"
MIN_LEASE_SECONDS = 300.0
LEASE_OF_SLOWEST: Final = 4  # the lease is this multiple of the longest time that this machine took for a shard
MAX_POLL_SECONDS: Final = 30.0
LOST_BEFORE_LISTING: Final = 3  # lost claims after which the output is listed: by then, about as many shards are taken as left
MAX_MACHINES: Final = 2  # a shard that failed on so many machines is not tried on others
FAILURE_SECONDS: Final = 3600.0  # a machine that starts tries again what failed before this time, by the store's clock
STATE_LENGTH: Final = 12  # hex characters
_MARK: Final = re.compile(r"(.+)\.failed\.(?:([0-9a-f]*)\.)?(\d+)")  # earlier versions wrote no state


class Shares(Protocol):
    """The shards that a run still has to do."""

    def take(self) -> str | None:
        """Name of the next shard. None if there is none now."""
        ...

    def settle(self, name: str, *, is_done: bool, seconds: float = 0.0) -> None:
        """A taken shard is committed, or has failed."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """The run ends before it has settled these shards."""
        ...

    def settled_elsewhere(self) -> dict[str, str | None]:
        """Shards that other machines have settled since the last call: {name: None, or why it failed}."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether `take` will never again return a shard."""
        ...

    @property
    def poll_seconds(self) -> float:
        """Time to wait before the next call of `take`, if it returned None."""
        ...


class AllShards:
    """All shards, in their order: this run is the only one."""

    poll_seconds = 1.0

    def __init__(self, names: Iterable[str]) -> None:
        self._left = deque(names)

    def take(self) -> str | None:
        return self._left.popleft() if self._left else None

    def settle(self, name: str, *, is_done: bool, seconds: float = 0.0) -> None: ...

    def release(self, names: Iterable[str]) -> None: ...

    def settled_elsewhere(self) -> dict[str, str | None]:
        return {}

    @property
    def is_over(self) -> bool:
        return not self._left


def shared_shards(
    names: Sequence[str], done: Iterable[str], machine: int, machines: int, root: str, state_of: Callable[[str], str]
) -> Shares | None:
    """The shards of output `root` that this machine takes part in. None if it is the only one."""
    return SharedShards(names, done, machine, machines, StoredBoard(root, machine), state_of) if machines > 1 else None


def state_of_input(url: str, **settings: object) -> str:
    """Hash of a shard's input and of the settings that decide whether the shard fails. Takes one request."""
    try:
        version = objects.version(url)
    except (UserError, OSError) as error:  # it is missing, or cannot be had: that may be why the shard fails
        version = type(error).__name__
    return fingerprint({"url": url, "version": version, **settings})[:STATE_LENGTH]


def forget_claims(root: str) -> None:
    """Delete what claims are left when all shards are done."""
    for url in objects.list_files(objects.join(root, CLAIMS)):
        objects.delete(url)


class Board(Protocol):
    """What the machines know of each other."""

    def create(self, name: str) -> bool:
        """Create a claim. True if it is this machine's, also from its earlier life."""
        ...

    def delete(self, name: str) -> None: ...

    def claims(self) -> dict[str, float]:
        """Claims and failures: {name: seconds since it was created}."""
        ...

    def done(self) -> set[str]:
        """Names of the committed shards."""
        ...

    def is_done(self, shard: str) -> bool: ...


@dataclass(frozen=True)
class StoredBoard:
    """Claims and manifests below an output."""

    root: str
    machine: int

    def create(self, name: str) -> bool:
        try:
            return objects.create_exclusive(objects.join(self.root, CLAIMS, name), f"machine {self.machine}\n".encode())
        except FileNotFoundError:  # another machine's, deleted before we could read whose it is
            return False

    def delete(self, name: str) -> None:
        objects.delete(objects.join(self.root, CLAIMS, name))

    def claims(self) -> dict[str, float]:
        folder, now = objects.join(self.root, CLAIMS), time.time()
        return {url.removeprefix(folder).strip("/"): now - created for url, created in objects.list_times(folder).items()}

    def done(self) -> set[str]:
        return done_shards(self.root)

    def is_done(self, shard: str) -> bool:
        return objects.exists(manifest_url(self.root, shard))


@dataclass
class _Watched:
    """Another machine's claim."""

    generation: int
    since: float  # when this machine first saw it


class SharedShards:
    """The part of the work that this machine gets hold of.

    Args:
        names: all shards of the output, equal on all machines.
        state_of: returns a hash of what decides whether the shard fails. It is called for shards that failed only.
    """

    def __init__(
        self,
        names: Sequence[str],
        done: Iterable[str],
        machine: int,
        machines: int,
        board: Board,
        state_of: Callable[[str], str],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._now, self._machine, self._state_of = board, now, machine, state_of
        self._draw = np.random.default_rng(machine)
        self._left = deque(_order(names, set(done), machine % machines, machines, self._draw))
        self._watched: dict[str, _Watched] = {}
        self._held: dict[str, int] = {}  # shard -> generation of this machine's claim
        self._elsewhere: dict[str, str | None] = {}
        self._slowest = 0.0
        self._listed_at = -MAX_POLL_SECONDS
        self._n_lost = 0
        self._left_behind = self._forget_failures()

    @property
    def is_over(self) -> bool:
        return not self._left and not self._watched

    @property
    def poll_seconds(self) -> float:
        return min(MAX_POLL_SECONDS, max(1.0, self._slowest / 4))

    @property
    def lease_seconds(self) -> float:
        return max(MIN_LEASE_SECONDS, LEASE_OF_SLOWEST * self._slowest)

    def take(self) -> str | None:
        while self._left:
            if self._n_lost >= LOST_BEFORE_LISTING:
                self._list()
                continue
            name = self._left[0]  # it stays in the list if the store is away
            is_ours = self._claim(name, self._left_behind.get(name, -1) + 1)
            self._left.popleft()
            if is_ours:
                return name
        if self._watched and self._now() - self._listed_at >= self.poll_seconds:
            self._list()
            stale = [name for name, claim in self._watched.items() if self._now() - claim.since > self.lease_seconds]
            self._draw.shuffle(stale)
            for name in stale:
                generation = self._watched[name].generation + 1
                if self._claim(name, generation):
                    del self._watched[name]
                    log.warning(
                        "shard %s: another machine claimed it and did not finish it in %.0f s", name, self.lease_seconds
                    )
                    return name
            return self.take() if self._left else None
        return None

    def settle(self, name: str, *, is_done: bool, seconds: float = 0.0) -> None:
        self._slowest = max(self._slowest, seconds)
        if not is_done:
            self._board.create(f"{name}.failed.{self._state_of(name)}.{self._machine}")
            _, failures = _parsed(self._board.claims())
            if _is_given_up(failures.get(name, ())):
                self._held.pop(name, None)  # the claim stays, so that no further machine tries it
                return
        self.release([name])

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            for generation in range(self._held.get(name, -1), -1, -1):
                self._board.delete(f"{name}.{generation}")
            self._held.pop(name, None)

    def settled_elsewhere(self) -> dict[str, str | None]:
        told, self._elsewhere = self._elsewhere, {}
        return told

    def _claim(self, name: str, generation: int) -> bool:
        if not self._board.create(f"{name}.{generation}"):
            self._n_lost += 1
            self._watched[name] = _Watched(generation, self._now())
            return False
        self._held[name] = generation
        if not self._board.is_done(name):
            self._n_lost = 0
            return True
        self.release([name])  # its maker has committed it and deleted the claim
        self._n_lost += 1
        self._elsewhere[name] = None
        self._watched.pop(name, None)
        return False

    def _list(self) -> None:
        # Claims first: a claim goes after its manifest came, so a shard that is in neither listing is free.
        claims, failures = _parsed(self._board.claims())
        claims = {name: number for name, number in claims.items() if number > self._left_behind.get(name, -1)}
        done = self._board.done()
        self._n_lost, self._listed_at = 0, self._now()
        open_ = {*self._left, *self._watched}
        self._elsewhere |= dict.fromkeys(open_ & done)
        marked = (open_ - done) & (claims.keys() | failures.keys())
        self._left = deque(name for name in [*self._left, *self._watched] if name not in done and name not in marked)
        watched, self._watched = self._watched, {}
        for name in sorted(marked):
            if any(failure.machine == self._machine for failure in failures.get(name, ())):
                continue
            if _is_given_up(failures.get(name, ())):
                self._elsewhere[name] = (
                    f"failed on {MAX_MACHINES} other machines; `dalle-ds data status` shows why. If its input is "
                    "repaired, the same command tries it again"
                )
            elif name not in claims:
                self._left.append(name)
            else:
                before = watched.get(name)
                is_known = before is not None and before.generation == claims[name]
                self._watched[name] = before if is_known else _Watched(claims[name], self._listed_at)

    def _forget_failures(self) -> dict[str, int]:
        """Delete the failures of earlier runs that do not count now.

        Returns:
            {shard: generation of the claim that its last failure left}. The next generation is free, and only one of the
            machines that start together gets it.
        """
        claims, failures = _parsed(self._board.claims())
        left_behind: dict[str, int] = {}
        for name, found in failures.items():
            lapsed = [failure for failure in found if failure.machine == self._machine or failure.age > FAILURE_SECONDS]
            if others := [failure for failure in found if failure not in lapsed]:
                state = self._state_of(name)
                lapsed += [failure for failure in others if failure.state != state]
            for failure in lapsed:
                self._board.delete(failure.mark)
            if lapsed and _is_given_up(found) and name in claims:
                left_behind[name] = claims[name]
        return left_behind


def _order(names: Sequence[str], done: set[str], machine: int, machines: int, draw: np.random.Generator) -> list[str]:
    start, end = len(names) * machine // machines, len(names) * (machine + 1) // machines
    rest = [*names[:start], *names[end:]]
    order = [*names[start:end], *(rest[place] for place in draw.permutation(len(rest)))]
    return [name for name in order if name not in done]


@dataclass(frozen=True)
class _Failure:
    mark: str
    machine: int
    state: str
    age: float  # seconds


def _is_given_up(failures: Sequence[_Failure]) -> bool:
    return len({failure.machine for failure in failures}) >= MAX_MACHINES


def _parsed(claims: Mapping[str, float]) -> tuple[dict[str, int], dict[str, list[_Failure]]]:
    # Returns {shard: highest generation of its claims}, {shard: its failures}.
    highest: dict[str, int] = {}
    failures: dict[str, list[_Failure]] = {}
    for claim, age in claims.items():
        if mark := _MARK.fullmatch(claim):
            failures.setdefault(mark[1], []).append(_Failure(claim, int(mark[3]), mark[2] or "", age))
        else:
            name, _, number = claim.rpartition(".")
            highest[name] = max(highest.get(name, 0), int(number))
    return highest, failures
