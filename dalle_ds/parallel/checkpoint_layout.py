"""Which rank's state file holds which range of a parameter: arithmetic, so that no file must be opened to find out."""

from collections import Counter
from collections.abc import Mapping

from dalle_ds.storage.record import Record

WEIGHTS, AVERAGE, OPTIMIZER, ERROR = "weights", "average", "optimizer", "error"
"""Families of kinds of values. A kind is a family, or FAMILY.KEY: "optimizer.exp_avg", or "error.3" for replica 3."""


def family_of(kind: str) -> str:
    return kind.partition(".")[0]


class FlatGroup(Record):
    """Parameters that ZeRO lays one after another and cuts into equal partitions, one for each rank of a replica.

    At ZeRO stage 3 each parameter is a group; without ZeRO too, with one partition.
    """

    partition: int
    """Number of values in a partition."""
    offsets: dict[str, int]
    """Index in the group at which each parameter begins."""


class Layout(Record):
    """Where the values of a checkpoint are. engine.json holds it."""

    n_shards: int
    """Number of ranks of a replica."""
    groups: tuple[FlatGroup, ...]
    whole_averages: bool
    """Whether rank 0 wrote all EMA weights, as below ZeRO stage 3, where all ranks hold them."""
    errors: tuple[str, ...] = ()
    """Kinds of PowerSGD's errors. The n-th was written by replica n."""

    def writers(self, ranges: Mapping[str, Mapping[str, tuple[int, int]]]) -> dict[int, int]:
        """Ranks whose files hold any value of these ranges, in ascending order, with the number of these values.

        Args:
            ranges: start and end in the flat parameter by name, by family, or for errors by kind. Empty ranges are in no file.
        """
        found: Counter[int] = Counter()
        for what, of_names in ranges.items():
            first_rank = self.errors.index(what) * self.n_shards if what in self.errors else 0
            for group in self.groups:
                for name, offset in group.offsets.items():
                    start, end = (offset + at for at in of_names.get(name, (0, 0)))
                    if start < end and what == AVERAGE and self.whole_averages:
                        found[0] += end - start
                    elif start < end:
                        for shard in range(start // group.partition, (end - 1) // group.partition + 1):
                            here = min(end, (shard + 1) * group.partition) - max(start, shard * group.partition)
                            found[first_rank + shard] += here
        return dict(sorted(found.items()))
