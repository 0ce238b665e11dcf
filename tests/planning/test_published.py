"""Estimated times against published runs of other projects, with one set of constants for all."""

import re
from pathlib import Path

import pytest

import dalle_ds.planning
from dalle_ds.planning.machines import MACHINES, machine
from dalle_ds.planning.published import PUBLISHED, TOLERANCE

README = Path(dalle_ds.planning.__file__).with_name("README.md").read_text()


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_within_30_percent_of_each(published):
    assert abs(published.error) < TOLERANCE, f"{published.name}: {published.error:+.0%}"


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_readme_has_the_error(published):
    estimate = published.run.tokens_per_second()
    error = round(100 * published.error)
    row = f"| {published.name} | {published.tokens_per_second:,.0f} | {estimate:,.0f} | {error:+d}% |"
    assert row in README, row


def test_the_figures_of_the_sources():
    by_name = {published.name: published for published in PUBLISHED}
    mfu = {
        name: published.tokens_per_second * published.run.flops_per_token / 989e12
        for name, published in by_name.items()
        if "Megatron" in name
    }
    assert min(mfu.values()) == pytest.approx(0.41, abs=0.005) and max(mfu.values()) == pytest.approx(0.49, abs=0.006)
    sizes = {name: re.search(r"([\d.]+)B,", name) for name in mfu}
    for name, size in sizes.items():
        run = by_name[name].run
        counted = 12 * run.n_layers * run.d_model**2 + 2 * run.vocab * run.d_model
        assert counted / 1e9 == pytest.approx(float(size[1]), rel=0.03)
    neox = by_name["GPT-NeoX-20B, 96 A100-40"]
    assert 6 * 20.55e9 * neox.tokens_per_second == pytest.approx(92e12, rel=0.01)


def test_machines_by_name_with_other_links():
    h100 = machine("H100")
    assert h100.but() == h100 and h100.inside_gbps == 3600
    assert h100.but(pcie=True).inside_gbps == 512 and h100.but(node_gbps=100).node_gbps == 100
    slower = h100.but(tflops=494.5, gpu_memory=94)
    assert slower.product_tflops == pytest.approx(h100.product_tflops / 2) and slower.memory_gib == 94
    for known in MACHINES.values():
        assert known.product_tflops < known.tflops and known.fp32_tflops <= known.tf32_tflops < known.tflops
