"""Validation of a dVAE: the results do not depend on the batch size; the page of its run says what is trained."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.parallel.ranks import ALONE
from dalle_ds.training.dvae import metrics as dvae_report
from dalle_ds.training.dvae.metrics import describe, measure, reconstruction_grid, reconstructions
from tests.training.dvae.runs import dvae_run


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(image_size=16, n_groups=2, n_blk_per_group=1, n_hid=8, n_init=8, n_codes=16))
    images_BCHW = torch.randint(256, (21, 3, 16, 16), dtype=torch.uint8)
    found, grids = [], []
    for batch in (16, 64, 5, 1):
        monkeypatch.setattr(dvae_report, "BATCH", batch)
        found.append(measure(model, images_BCHW, 0.5, -3.0, ALONE))
        grids.append(np.asarray(reconstruction_grid(*reconstructions(model, images_BCHW))))
    first, counts_K = found[0]
    assert first.elb_hard != first.elb_relaxed and first.codes_used > 4
    for numbers, counts in found[1:]:
        assert asdict(numbers) == pytest.approx(asdict(first), rel=1e-6)
        assert np.array_equal(counts, counts_K)
    assert all(np.array_equal(grid, grids[0]) for grid in grids)


def test_page_says_what_is_trained() -> None:
    text = describe(dvae_run(Path("raw"), Path("run")), n_parameters=2_800_000, world_size=3)
    assert "16 px, 8 x 8 codes of 32, with 2.8 million parameters: 12 updates of 8 images from `raw` on 3 ranks" in text
    assert "`validation/psnr`" in text
