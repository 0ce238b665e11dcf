"""Group names into buckets of bounded size, for the weights files of a model and the communication buckets of an update."""

from collections.abc import Callable, Iterable


def in_buckets(names: Iterable[str], size_of: Callable[[str], int], limit: float) -> list[list[str]]:
    """Cut the names, in order, into lists. A new list starts when the total size would exceed `limit`."""
    buckets: list[list[str]] = []
    used = 0
    for name in names:
        used += size_of(name)
        if not buckets or used > limit:
            buckets.append([])
            used = size_of(name)
        buckets[-1].append(name)
    return buckets
