"""Which shard this machine takes next, when several machines fill one output.

A machine claims a shard before it works on it, by creating `claims/SHARD.GENERATION` below the output, which only one machine
can. It deletes its claim when the shard is committed. Claims save work; they decide nothing: if two machines work on one shard
after all, the commit of one of them wins.

Each machine begins with a part of the list that is its own, then takes the rest in a random order of its own, so that machines
rarely ask for the same shard. It lists the output only after it has lost some claims, and while it has nothing to do.

A dead machine leaves claims. Whoever has nothing else to do watches them, and takes over a claim that stays for longer than the
lease, by creating the next generation. The watcher measures this time itself, so clocks of machines are not compared. A
machine that starts again gets its earlier claims at once, because they contain its number.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from dalle_ds.data.manifest import done_shards, manifest_url
from dalle_ds.storage import objects

log = logging.getLogger(__name__)

CLAIMS: Final = "claims"
MIN_LEASE_SECONDS = 300.0
LEASE_OF_SLOWEST: Final = 4  # the lease is this multiple of the longest time that this machine took for a shard
MAX_POLL_SECONDS: Final = 30.0
LOST_BEFORE_LISTING: Final = 3  # lost claims after which the output is listed: by then, about as many shards are taken as left
MAX_MACHINES: Final = 2  # a shard that failed on so many machines is not tried on others
_FAILED: Final = "failed"


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


def shared_shards(names: Sequence[str], done: Iterable[str], machine: int, machines: int, root: str) -> Shares | None:
    """The shards of output `root` that this machine takes part in. None if it is the only one."""
    return SharedShards(names, done, machine, machines, StoredBoard(root, machine)) if machines > 1 else None


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

    def claims(self) -> set[str]: ...

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

    def claims(self) -> set[str]:
        folder = objects.join(self.root, CLAIMS)
        return {url.removeprefix(folder).strip("/") for url in objects.list_files(folder)}

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
    """The part of the work that this machine gets hold of. `names` are all shards of the output, equal on all machines."""

    def __init__(
        self,
        names: Sequence[str],
        done: Iterable[str],
        machine: int,
        machines: int,
        board: Board,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._now, self._machine = board, now, machine
        self._draw = np.random.default_rng(machine)
        self._left = deque(_order(names, set(done), machine % machines, machines, self._draw))
        self._watched: dict[str, _Watched] = {}
        self._held: dict[str, int] = {}  # shard -> generation of this machine's claim
        self._elsewhere: dict[str, str | None] = {}
        self._slowest = 0.0
        self._listed_at = -MAX_POLL_SECONDS
        self._n_lost = 0
        for mark in self._board.claims():  # of an earlier run: the shard may be mended
            if mark.endswith(f".{_FAILED}.{machine}"):
                self._board.delete(mark)

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
            is_ours = self._claim(name, 0)
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
            self._board.create(f"{name}.{_FAILED}.{self._machine}")
            _, failed_on = _parsed(self._board.claims())
            if len(failed_on.get(name, ())) >= MAX_MACHINES:
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
        claims, failed_on = _parsed(self._board.claims())
        done = self._board.done()
        self._n_lost, self._listed_at = 0, self._now()
        open_ = {*self._left, *self._watched}
        self._elsewhere |= dict.fromkeys(open_ & done)
        marked = (open_ - done) & (claims.keys() | failed_on.keys())
        self._left = deque(name for name in [*self._left, *self._watched] if name not in done and name not in marked)
        watched, self._watched = self._watched, {}
        for name in sorted(marked):
            if self._machine in failed_on.get(name, ()):
                continue
            if len(failed_on.get(name, ())) >= MAX_MACHINES:
                self._elsewhere[name] = f"failed on {MAX_MACHINES} other machines; `dalle-ds data status` shows why"
            elif name not in claims:
                self._left.append(name)
            else:
                before = watched.get(name)
                is_known = before is not None and before.generation == claims[name]
                self._watched[name] = before if is_known else _Watched(claims[name], self._listed_at)


def _order(names: Sequence[str], done: set[str], machine: int, machines: int, draw: np.random.Generator) -> list[str]:
    start, end = len(names) * machine // machines, len(names) * (machine + 1) // machines
    rest = [*names[:start], *names[end:]]
    order = [*names[start:end], *(rest[place] for place in draw.permutation(len(rest)))]
    return [name for name in order if name not in done]


def _parsed(claims: Iterable[str]) -> tuple[dict[str, int], dict[str, set[int]]]:
    # Returns {shard: highest generation of its claims}, {shard: machines on which it failed}.
    highest: dict[str, int] = {}
    failed_on: dict[str, set[int]] = {}
    for claim in claims:
        name, _, number = claim.rpartition(".")
        if name.endswith(f".{_FAILED}"):
            failed_on.setdefault(name.removesuffix(f".{_FAILED}"), set()).add(int(number))
        else:
            highest[name] = max(highest.get(name, 0), int(number))
    return highest, failed_on
