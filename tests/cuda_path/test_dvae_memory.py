"""Memory of the full-size dVAE, on fake tensors: shapes and lifetimes are real; values and cuDNN's workspaces don't exist."""

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.training.dvae.metrics import BATCH, measured_tensors
from preprocessing.configs import EncodeConfig

GIB = 2**30


def peak(model: nn.Module, work: Callable[[], object]) -> int:
    """Returns the peak bytes of live tensors, including the model's."""
    with MemTracker() as tracker:
        tracker.track_external(model)
        work()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())


def test_validation_at_256_pixels_fits_a_gpu_of_16_gib() -> None:
    """With batches of 64 images it took 25.5 GiB. AdamW's moments, the EMA and its swapped copy take 1.5 GiB in addition."""
    config = DVAEConfig()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DVAE(config)
        images_BCHW = torch.empty(BATCH, 3, config.image_size, config.image_size, dtype=torch.uint8)
        noises = [torch.Generator() for _ in range(BATCH)]
        taken = peak(model, lambda: measured_tensors(model, images_BCHW, 0.5, None, noises))
    assert 6 * GIB < taken < 8 * GIB


def test_encoding_at_256_pixels_fits_a_gpu_of_16_gib() -> None:
    config = DVAEConfig()
    n_images = EncodeConfig.model_fields["batch"].default
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DVAE(config)
        images_BCHW = torch.empty(n_images, 3, config.image_size, config.image_size, dtype=torch.uint8)
        taken = peak(model, lambda: model.tokens(images_BCHW))
    assert 8 * GIB < taken < 12 * GIB
