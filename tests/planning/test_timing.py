"""Times of products, collectives and whole updates, against calculations by hand."""

import pytest

from dalle_ds.planning import timing
from dalle_ds.planning.machines import machine
from dalle_ds.planning.timing import Collective, Group, Product, Work, Workload, times

H100 = machine("H100")


def test_products_near_their_best_only_where_they_are_large():
    best = H100.product_tflops * 1e12 * timing.PRODUCT_SHARE
    rates = [p.flops / p.seconds(H100) for p in (Product(n, n, n) for n in (512, 1024, 2048, 4096, 16384))]
    assert rates == sorted(rates) and rates[0] < 0.2 * best and 0.97 * best < rates[-1] < best
    small, eightfold = Product(1280, 2048, 2048).seconds(H100), Product(10240, 2048, 2048).seconds(H100)
    assert small < eightfold < 8 * small
    half, exact = Product(8192, 4096, 4096), Product(8192, 4096, 4096, format="fp32")
    assert exact.seconds(H100) / half.seconds(H100) == pytest.approx(989 / 67)


def test_collectives_by_hand():
    inside = Collective(8e9, Group.of_neighbours(8, 8))
    assert inside.between_seconds(H100) == 0
    assert inside.inside_seconds(H100) == pytest.approx(7e9 / (450e9 * timing.LINK_SHARE) + 7 * timing.STEP_SECONDS)
    # four nodes of 400 GB/s: three quarters of the data enter each node, once
    across = Collective(8e9, Group.of_neighbours(32, 8), calls=10)
    latency = 10 * (28 * timing.STEP_SECONDS + 3 * timing.NODE_STEP_SECONDS)
    assert across.between_seconds(H100) == pytest.approx(6e9 / (400e9 * timing.NETWORK_SHARE) + latency)
    # shards of 8 on 16 nodes: each adapter carries the data that its GPU averages with 15 others
    peers = Collective(1e9, Group.of_peers(16, 8, 8))
    assert peers.group == Group(16, 16, 8) and peers.inside_seconds(H100) == 0
    latency = 15 * timing.NODE_STEP_SECONDS
    assert peers.between_seconds(H100) == pytest.approx(8e9 * 15 / 16 / (400e9 * timing.NETWORK_SHARE) + latency)
    assert Group.of_peers(4, 2, 8) == Group(4, 1, 2) and Collective(1.0, Group.of_neighbours(1, 8)).inside_seconds(H100) == 0


@pytest.mark.parametrize(
    ("work", "binds"),
    [
        (Work(memory_bytes=1e12), "compute"),
        (Work(memory_bytes=1e9, collectives=(Collective(1e12, Group(8, 1)),)), "links inside nodes"),
        (Work(memory_bytes=1e9, collectives=(Collective(1e12, Group(64, 8)),)), "links between nodes"),
        (Work(memory_bytes=1e9, host_seconds=1.0), "host"),
    ],
)
def test_the_longest_binds(work, binds):
    found = times(work, H100.but(node_gbps=800))
    assert found.binds == binds and found.longest == max(found.compute, found.inside, found.between, found.host)


def test_an_update_is_its_micro_steps_and_its_end():
    step = Work(products=(Product(4096, 4096, 4096),), attention_flops=1e12, attention_share=0.5, host_seconds=1e-3)
    end = Work(memory_bytes=1e9, collectives=(Collective(1e9, Group(8, 1)),))
    workload = Workload(step, 4, end, useful_flops=4e12)
    one = times(step, H100)
    assert one.parts["attention"] == pytest.approx(1e12 / (0.5 * H100.product_tflops * 1e12 * timing.PRODUCT_SHARE))
    last = times(end, H100)
    assert workload.seconds(H100) == pytest.approx(4 * one.longest + last.compute + last.inside)
    assert workload.mfu(H100) == pytest.approx(4e12 / workload.seconds(H100) / 989e12)
    waiting = Workload(step, 4, end, useful_flops=4e12, n_idle_steps=3)
    assert waiting.seconds(H100) - workload.seconds(H100) == pytest.approx(3 * one.longest)
    waited = times(Work(waited_for=end.collectives), H100)
    assert waited.compute == last.inside and waited.inside == 0
