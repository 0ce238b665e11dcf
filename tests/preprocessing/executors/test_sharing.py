"""Sharing shards over machines: little work is done twice, whatever machines start, stop or lag behind."""

import heapq
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from dalle_ds.data.commit import new_attempt
from dalle_ds.data.manifest import done_shards, manifest_url
from dalle_ds.errors import DataError
from dalle_ds.storage import objects
from preprocessing.executors import sharing
from preprocessing.executors.local import run_shards
from preprocessing.executors.sharing import SharedShards, StoredBoard, forget_claims

N_SHARDS, SHARD_SECONDS, REQUEST_SECONDS = 25_000, 60.0, 0.03


@dataclass
class World:
    """Simulated claims and manifests of one output, in virtual time."""

    now: float = 0.0
    claimed: dict[str, tuple[int, float]] = field(default_factory=dict)  # {name: machine, when}
    committed: set[str] = field(default_factory=set)
    n_requests: int = 0
    work: float = 0.0  # seconds of workers
    wasted: float = 0.0  # of these, on shards that were committed before
    finished: float = 0.0  # when the last shard was committed
    n_failures: int = 0


@dataclass
class Board:
    """A machine's view of the world. Its requests take time."""

    world: World
    machine: int
    seconds: float = 0.0  # of the requests since the last event

    def time(self) -> float:
        return self.world.now + self.seconds

    def _request(self, n: int = 1) -> None:
        self.world.n_requests += n
        self.seconds += n * REQUEST_SECONDS

    def create(self, name: str) -> bool:
        self._request()
        return self.world.claimed.setdefault(name, (self.machine, self.world.now))[0] == self.machine

    def delete(self, name: str) -> None:
        self._request()
        self.world.claimed.pop(name, None)

    def claims(self) -> dict[str, float]:
        self._request(1 + len(self.world.claimed) // 1000)
        return {name: self.world.now - since for name, (_, since) in self.world.claimed.items()}

    def done(self) -> set[str]:
        self._request(1 + len(self.world.committed) // 1000)
        return self.world.committed

    def is_done(self, shard: str) -> bool:
        self._request()
        return shard in self.world.committed


@dataclass(frozen=True)
class Machine:
    number: int
    of: int
    speed: float = 1.0
    starts: float = 0.0  # seconds
    dies: float = float("inf")  # with its claims


def simulate(machines: Sequence[Machine], n_workers: int, fails: Callable[[str], bool] = lambda _: False) -> World:
    """Let the machines do all shards, but those that fail on every machine."""
    world, draw = World(), random.Random(0)
    names = [f"{number:05d}" for number in range(N_SHARDS)]
    boards = {machine: Board(world, machine.number) for machine in machines}
    shares: dict[Machine, SharedShards] = {}
    starts = [(machine.starts + draw.random(), machine) for machine in machines for _ in range(n_workers)]
    events: list[tuple[float, int, Machine, str | None, float]] = [
        (at, number, machine, None, 0.0) for number, (at, machine) in enumerate(starts)
    ]
    heapq.heapify(events)
    n_events = len(events)
    while events:
        world.now, _, machine, shard, seconds = heapq.heappop(events)
        if world.now >= machine.dies:
            continue
        board = boards[machine]
        board.seconds = 0.0
        if machine not in shares:
            shares[machine] = SharedShards(names, world.committed, machine.number, machine.of, board, lambda _: "0", board.time)
        if shard is not None:
            world.work += seconds
            if fails(shard):
                world.n_failures += 1
                world.wasted += seconds
            elif shard in world.committed:
                world.wasted += seconds
            else:
                world.committed.add(shard)
                world.finished = world.now
            shares[machine].settle(shard, is_done=not fails(shard), seconds=seconds)
        following = shares[machine].take()
        n_events += 1
        if following is not None:
            seconds = SHARD_SECONDS / machine.speed * draw.uniform(0.85, 1.15)
            heapq.heappush(events, (board.time() + seconds, n_events, machine, following, seconds))
        elif not shares[machine].is_over:
            heapq.heappush(events, (board.time() + shares[machine].poll_seconds, n_events, machine, None, 0.0))
    return world


def ideal(machines: Sequence[Machine], n_workers: int) -> float:
    """Time in which the machines could do all shards if none of their time were lost."""
    time, left = 0.0, N_SHARDS * SHARD_SECONDS
    changes = sorted({at for machine in machines for at in (machine.starts, machine.dies)})
    for start, end in zip(changes, [*changes[1:], float("inf")], strict=True):
        rate = n_workers * sum(machine.speed for machine in machines if machine.starts <= start < machine.dies)
        if rate * (end - start) >= left:
            return start + left / rate
        time, left = end, left - rate * (end - start)
    raise AssertionError(f"{left} seconds of work are left at {time}")


def fleet(n: int, of: int | None = None, **changes: Callable[[int], float]) -> list[Machine]:
    given = [{name: change(number) for name, change in changes.items()} for number in range(n)]
    return [Machine(number, of or n, **more) for number, more in enumerate(given)]


INFINITE = float("inf")
CASES: dict[str, tuple[list[Machine], int]] = {
    "64 of 64": (fleet(64), 8),
    "64 of 64, speeds 0.8 to 1.2": (fleet(64, speed=lambda number: 0.8 + 0.4 * number / 63), 8),
    "64 of 64, 8 start two hours late": (fleet(64, starts=lambda number: 7200.0 if number >= 56 else 0.0), 1),
    "16 of 16, 2 at half speed": (fleet(16, speed=lambda number: 0.5 if number >= 14 else 1.0), 8),
    "60 of 64, 4 never start": ([machine for machine in fleet(64) if machine.number % 16 != 5], 8),
    "16 of 64 at a time": (fleet(16, of=64), 8),
    "48 of 64 got nodes": (fleet(48, of=64), 8),
    "64 of 64, 16 die half way with their claims": (fleet(64, dies=lambda number: 1500.0 if number % 4 == 1 else INFINITE), 8),
}


@pytest.mark.parametrize("case", CASES)
def test_machines_do_little_twice_and_finish_in_time(case: str) -> None:
    machines, n_workers = CASES[case]
    world = simulate(machines, n_workers)
    assert len(world.committed) == N_SHARDS
    assert world.wasted <= 0.05 * world.work
    assert world.finished <= 1.10 * ideal(machines, n_workers)
    assert world.n_requests <= 5 * N_SHARDS


def test_damaged_shards_are_tried_twice_also_by_machines_that_start_later() -> None:
    """A percent of the shards. Of 64 machines 16 run at a time, so the others start when all of these have failed."""
    first = fleet(16, of=64, dies=lambda _: 3_000.0)
    later = [Machine(number, 64, starts=3_000.0 + 10 * (number % 16)) for number in range(16, 64)]
    world = simulate([*first, *later], 8, fails=lambda name: name.endswith("50"))
    assert len(world.committed) == 0.99 * N_SHARDS
    assert 500 <= world.n_failures <= 510
    assert world.wasted <= 0.05 * world.work
    assert world.n_requests <= 5 * N_SHARDS


def test_a_machine_that_dies_at_the_end_costs_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = fleet(16, of=64, dies=lambda number: 11_700.0 if number < 2 else INFINITE)
    world = simulate(machines, 8)
    assert len(world.committed) == N_SHARDS
    assert world.finished <= 11_700 + sharing.MIN_LEASE_SECONDS + 3 * SHARD_SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# The real executor on a real store, a process a machine
# ---------------------------------------------------------------------------------------------------------------------

N_REAL = 48


@dataclass(frozen=True)
class Sleepy:
    """Sleeps, then commits, as encode does, and notes each shard that it begins."""

    out: str
    begun: list[str]

    def start(self, n_threads: int) -> Callable[[str], bool]:
        return self.work

    def work(self, shard: str) -> bool:
        self.begun.append(shard)
        time.sleep(0.02)
        return objects.create_exclusive(manifest_url(self.out, shard), new_attempt().encode())


NAMES = [f"{number:05d}" for number in range(N_REAL)]


def sharing_as(machine: int, of: int, out: str, done: Iterable[str] = ()) -> SharedShards:
    return SharedShards(NAMES, done, machine, of, StoredBoard(out, machine), lambda _: "0")


def work_as(machine: int, of: int, out: str, begun: list[str]) -> dict[str, str]:
    done = done_shards(out)  # once: what others finish meanwhile is told by `shares`
    todo, shares = [name for name in NAMES if name not in done], sharing_as(machine, of, out, done)
    job = Sleepy(out, begun)
    return run_shards(job, todo, n_workers=1, name=str, size=lambda _: 1, what="work", unit="shard", shares=shares)[1]


def test_real_machines_on_a_real_store_do_nothing_twice(any_root: str) -> None:
    """Three of twelve machines: three quarters of the shards are in nobody's own part. A dead one has left its claims."""
    begun: list[str] = []
    dead = sharing_as(7, 12, any_root)
    left_behind = [dead.take(), dead.take()]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(sharing, "MIN_LEASE_SECONDS", 1)
        failures = list(pool.map(lambda machine: work_as(machine, 12, any_root, begun), (0, 1, 2)))
    assert failures == [{}, {}, {}]
    assert done_shards(any_root) == set(NAMES)
    assert sorted(begun) == NAMES
    assert set(begun[-2:]) == set(left_behind)
    assert objects.list_files(f"{any_root}/claims") == []


def test_a_machine_that_starts_again_goes_on_with_its_claims(tmp_path: object) -> None:
    names = ["a", "b"]
    first, second, again = (
        SharedShards(names, (), machine, 2, StoredBoard(str(tmp_path), machine), lambda _: "0") for machine in (0, 1, 0)
    )
    assert (first.take(), second.take()) == ("a", "b")
    assert (again.take(), again.take()) == ("a", None)


def test_numbers_that_count_from_one_share_as_those_from_zero(any_root: str) -> None:
    shares = [sharing_as(machine, 3, any_root) for machine in (1, 2, 3)]
    assert [one.take() for one in shares] == [NAMES[16], NAMES[32], NAMES[0]]
    begun: list[str] = []
    for one in shares:
        one.release(NAMES)
    with ThreadPoolExecutor(3) as pool:
        failures = list(pool.map(lambda machine: work_as(machine, 3, any_root, begun), (1, 2, 3)))
    assert failures == [{}, {}, {}] and sorted(begun) == NAMES


def try_all(shares: SharedShards, out: str, bad: str) -> list[str]:
    """Returns the shards that the machine tried; those in `bad` fail."""
    tried = []
    while (name := shares.take()) is not None:
        tried.append(name)
        if name not in bad:
            objects.write_bytes(manifest_url(out, name), b"{}")
        shares.settle(name, is_done=name not in bad)
    return tried


def test_a_shard_that_fails_is_tried_on_two_machines_and_no_more(tmp_path: object) -> None:
    out, names = str(tmp_path), ["a", "b", "c"]
    machines = [SharedShards(names, (), number, 8, StoredBoard(out, number), lambda _: "0") for number in range(3)]
    tried = [name for shares in [*machines, *machines] for name in try_all(shares, out, "b")]
    assert sorted(tried) == ["a", "b", "b", "c"]
    third = SharedShards(names, done_shards(out), 7, 8, StoredBoard(out, 7), lambda _: "0")
    assert third.take() is None and third.is_over
    (told,) = third.settled_elsewhere().items()
    assert told[0] == "b" and "failed on 2 other machines; `dalle-ds data status` shows why" in str(told[1])
    forget_claims(out)
    assert objects.list_files(f"{out}/claims") == []


@pytest.mark.parametrize("why", ["other input", "same number", "an hour"])
def test_a_failure_of_another_input_or_of_long_ago_does_not_count(
    any_root: str, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    names = ["a", "b"]

    def start(machine: int, state: str) -> SharedShards:
        return SharedShards(names, done_shards(any_root), machine, 5, StoredBoard(any_root, machine), lambda _: state)

    assert "b" in try_all(start(0, "0"), any_root, "b") and try_all(start(1, "0"), any_root, "b") == ["b"]
    assert try_all(start(4, "0"), any_root, "b") == []
    if why == "an hour":
        monkeypatch.setattr(sharing, "FAILURE_SECONDS", -3.0)
    numbers = (0, 4) if why == "same number" else (4, 3)
    states = ["1", "1"] if why == "other input" else ["0", "0"]
    begun = [start(number, state) for number, state in zip(numbers, states, strict=True)]
    tried = [shares.take() for shares in begun]
    assert tried == ["b", None], "one of the machines that start together tries it, at once"
    objects.write_bytes(manifest_url(any_root, "b"), b"{}")
    begun[0].settle("b", is_done=True)
    monkeypatch.setattr(begun[1], "_listed_at", -1000.0)
    assert begun[1].take() is None and begun[1].is_over and begun[1].settled_elsewhere() in ({"b": None}, {})


def test_a_repaired_shard_that_fails_again_is_given_up_again(tmp_path: object) -> None:
    out = str(tmp_path)
    for state in "01":
        machines = [
            SharedShards(["a"], (), number, 9, StoredBoard(out, number), lambda _, state=state: state) for number in (3, 5, 7)
        ]
        tried = [try_all(shares, out, "a") for shares in machines]
        assert sorted(tried) == [[], ["a"], ["a"]]


class Damaged(DataError):
    pass
