"""Memory of the full-size dVAE, on fake tensors: shapes and lifetimes are real, values and workspaces of cuDNN are not."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.training.dvae_report import BATCH, measured_tensors

GIB = 2**30


def test_validation_at_256_pixels_fits_a_gpu_of_16_gib() -> None:
    """It was 25.5 GiB at 64 pictures a batch. Beside it lie moments, the average and its swapped copy: 1.5 GiB."""
    config = DVAEConfig()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DVAE(config)
        images_BCHW = torch.empty(BATCH, 3, config.image_size, config.image_size, dtype=torch.uint8)
        noises = [torch.Generator() for _ in range(BATCH)]
        with MemTracker() as tracker:
            tracker.track_external(model)
            measured_tensors(model, images_BCHW, 0.5, None, noises)
    peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    assert 6 * GIB < peak < 8 * GIB
