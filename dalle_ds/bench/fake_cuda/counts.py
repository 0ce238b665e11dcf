"""Counts of GPU work: kernels, bytes, host synchronisations and collectives, each by line of code."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
"""Matrix products. They are bound by arithmetic, so their bytes are counted separately."""


class Site(NamedTuple):
    """An operator, and the innermost line of this project or of DeepSpeed that ran it (if there is none: the autograd node)."""

    what: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.what} at {self.file}:{self.line} {self.function}"

    @property
    def place(self) -> str:
        """Operator, file and function. Tests compare this, because the line number changes with every edit."""
        return f"{self.what}: {self.file} {self.function}"

    @property
    def by_zero(self) -> bool:
        """Whether this is DeepSpeed's work: gathering weights, reducing gradients. Its linear layer counts as the model's."""
        return self.file.startswith("deepspeed/") and not self.file.endswith("zero/linear.py")


@dataclass
class Counts:
    """Counts by site. Counts add, subtract and scale: the cost of one more layer is the difference of two runs.

    An operator that computes or copies something on the GPU is one kernel; a compiled function declares its number of kernels.
    Bytes are those of the elements that a kernel must read and write once. Caches and atomics are ignored.
    """

    kernels: Counter[Site] = field(default_factory=Counter)
    read: Counter[Site] = field(default_factory=Counter)
    written: Counter[Site] = field(default_factory=Counter)
    syncs: Counter[Site] = field(default_factory=Counter)
    """Host synchronisations: the host waits for the GPU."""
    collectives: Counter[Site] = field(default_factory=Counter)
    sent: Counter[Site] = field(default_factory=Counter)
    """Bytes of the larger side of each collective: the whole tensor that is gathered, scattered or summed."""

    def __add__(self, other: "Counts") -> "Counts":
        return self._with(other, lambda mine, theirs: mine + theirs)

    def __sub__(self, other: "Counts") -> "Counts":
        return self._with(other, lambda mine, theirs: mine - theirs)

    def __truediv__(self, n: float) -> "Counts":
        return self._with(self, lambda mine, _: mine / n)

    def _with(self, other: "Counts", combine: Callable[[float, float], float]) -> "Counts":
        def counter(name: str) -> Counter[Site]:
            mine, theirs = getattr(self, name), getattr(other, name)
            values = {site: combine(mine[site], theirs[site]) for site in mine.keys() | theirs.keys()}
            return Counter({site: value for site, value in values.items() if value})

        return Counts(**{f.name: counter(f.name) for f in fields(self)})

    def where(self, keep: Callable[[Site], bool]) -> "Counts":
        """Returns the counts of the sites for which `keep` is true."""
        return Counts(
            **{f.name: Counter({site: n for site, n in getattr(self, f.name).items() if keep(site)}) for f in fields(self)}
        )

    @property
    def n_kernels(self) -> float:
        return math.fsum(self.kernels.values())

    @property
    def n_bytes(self) -> float:
        return math.fsum(self.read.values()) + math.fsum(self.written.values())

    @property
    def n_syncs(self) -> float:
        return math.fsum(self.syncs.values())

    def sync_places(self) -> dict[str, float]:
        """Returns the number of host synchronisations by operator, file and function, without line numbers."""
        places: Counter[str] = Counter()
        for site, times in self.syncs.items():
            places[site.place] += times
        return dict(places)

    def table(self, n: int = 20) -> str:
        """Returns a readable table of the `n` sites with the most bytes."""
        total = Counter(self.read)
        total.update(self.written)
        rows = sorted(total, key=lambda site: -total[site])[:n]
        return "\n".join(f"{total[site] / 1e6:10.1f} MB {self.kernels[site]:8.2f} kernels  {site}" for site in rows)
