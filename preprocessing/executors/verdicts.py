"""Which is at fault when a shard fails: the shard, or the worker that had it.

A failed shard goes to another worker. If it fails there too, the shard is at fault, and nothing is held against the workers. If
it succeeds there, the first worker is to blame; one that is to blame for MAX_BLAMES shards since its last success is retired.
A worker with so many failures that nobody has judged gets no new shard, since a full disk fails a shard in milliseconds while
others take minutes, and the bad worker would try them all.
"""

from collections import Counter, defaultdict
from collections.abc import Set
from typing import Final

MAX_BLAMES: Final = 3
MAX_LOST: Final = 3  # workers that died on one shard; a worker may die for other reasons than its shard


class Verdicts:
    """Judges failures. Workers are numbered; `ready` are those that could take a shard now or later."""

    def __init__(self) -> None:
        self._failed_on: defaultdict[str, set[int]] = defaultdict(set)  # unjudged failures: shard -> workers
        self._lost_on: defaultdict[str, list[int]] = defaultdict(list)  # workers that died
        self._doubts: defaultdict[int, set[str]] = defaultdict(set)  # worker -> shards of its unjudged failures
        self._blames: Counter[int] = Counter()

    def succeeded(self, worker: int, shard: str) -> list[int]:
        """Returns the workers that must be retired."""
        self._forget(worker)
        others = (self._failed_on.pop(shard, set()) | set(self._lost_on.pop(shard, []))) - {worker}
        blamed = [other for other in sorted(others) if shard in self._doubts[other]]
        for other in blamed:
            self._doubts[other].remove(shard)
            self._blames[other] += 1
        return [other for other in blamed if self._blames[other] >= MAX_BLAMES]

    def failed(self, worker: int, shard: str, ready: Set[int]) -> bool:
        """Returns whether the shard is at fault, or no other worker can try it."""
        self._failed_on[shard].add(worker)
        self._doubts[worker].add(shard)
        if len(self._failed_on[shard]) < 2 and ready - self._failed_on[shard]:
            return False
        self._judge(shard)
        return True

    def lost(self, worker: int, shard: str) -> bool:
        """The worker died. Returns whether too many have died on this shard."""
        self._lost_on[shard].append(worker)
        self._doubts[worker].add(shard)
        if len(self._lost_on[shard]) < MAX_LOST:
            return False
        self._judge(shard)
        return True

    def given_up(self, shard: str) -> None:
        """No worker can try the shard any more."""
        self._judge(shard)

    def is_suspended(self, worker: int) -> bool:
        """Whether the worker must not take new shards."""
        return len(self._doubts[worker]) + self._blames[worker] >= MAX_BLAMES

    def may_retry(self, worker: int, shard: str, ready: Set[int]) -> bool:
        """Whether the worker should try a shard that failed before."""
        if worker in self._failed_on[shard]:
            return False
        others = ready - self._failed_on[shard] - set(self._lost_on[shard]) - {worker}
        if worker in self._lost_on[shard]:
            return not others
        return not self.is_suspended(worker) or all(map(self.is_suspended, others))

    def _judge(self, shard: str) -> None:
        for worker in self._failed_on.pop(shard, set()) | set(self._lost_on.pop(shard, [])):
            self._doubts[worker].discard(shard)

    def _forget(self, worker: int) -> None:
        self._doubts.pop(worker, None)
        self._blames.pop(worker, None)
