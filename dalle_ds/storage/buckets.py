"""Names in groups of bounded size: files of a model, messages of an update."""

from collections.abc import Callable, Iterable


def in_buckets(names: Iterable[str], size_of: Callable[[str], int], limit: float) -> list[list[str]]:
    """Names in order, as few lists as keep each within `limit` (or one name long)."""
    buckets: list[list[str]] = []
    used = 0
    for name in names:
        used += size_of(name)
        if not buckets or used > limit:
            buckets.append([])
            used = size_of(name)
        buckets[-1].append(name)
    return buckets
