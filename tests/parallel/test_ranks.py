"""What ranks tell each other, by threads."""

import inspect

import pytest
import torch

from dalle_ds.errors import DataError, StoreUnreachable
from dalle_ds.parallel.ranks import Ranks
from tests.support.thread_ranks import ThreadRank, run_ranks


def test_threads_replace_every_method_that_uses_the_process_group() -> None:
    using = {name for name, method in vars(Ranks).items() if inspect.isfunction(method) and "dist" in method.__code__.co_names}
    assert using and using <= set(vars(ThreadRank)), "tests by threads would fail for want of a process group"


def test_results_of_all_ranks_in_rank_order() -> None:
    assert run_ranks(3, lambda ranks: ranks.each(lambda: ranks.rank * 10)) == [[0, 10, 20]] * 3
    assert run_ranks(3, lambda ranks: ranks.each_to_main(lambda: ranks.rank * 10)) == [[0, 10, 20], [], []]
    assert run_ranks(2, lambda ranks: ranks.from_main(ranks.rank + 5)) == [5, 5]
    assert run_ranks(3, lambda ranks: ranks.sum(torch.tensor([1.0, ranks.rank])).tolist()) == [[3.0, 3.0]] * 3


@pytest.mark.parametrize("collective", [Ranks.each, Ranks.each_to_main])
def test_an_error_of_one_rank_is_raised_on_all(collective) -> None:
    def attempt(ranks: Ranks) -> tuple[str, int]:
        def fail() -> None:
            if ranks.rank == 1:
                raise StoreUnreachable("away", url="s3://bucket/a")

        with pytest.raises(StoreUnreachable) as raised:
            collective(ranks, fail)
        return str(raised.value), raised.value.exit_code

    (told, code), *others = run_ranks(3, attempt)
    assert told.startswith("rank 1: ") and "away" in told and code == 75 and others == [(told, code)] * 2


def test_an_error_of_the_main_rank_is_raised_on_all() -> None:
    def attempt(ranks: Ranks) -> str:
        def fail() -> None:
            assert ranks.is_main, "no other rank is asked"
            raise DataError("broken")

        with pytest.raises(DataError) as raised:
            ranks.once(fail)
        return str(raised.value)

    assert run_ranks(3, attempt) == ["broken"] * 3
