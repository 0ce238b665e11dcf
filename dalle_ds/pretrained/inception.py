"""Inception v3 for FID and Inception Score: torch-fidelity's network with weights from a local file. Nothing is downloaded.

B images, H and W pixels, D features, K classes.
"""

import importlib.util
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.storage.hashing import sha256_of_file

FEATURES, LOGITS = "2048", "logits_unbiased"  # torch-fidelity's names of the outputs that it uses for the two scores


class Inception:
    """The network in fp32. It resizes images to 299 pixels as TensorFlow 1 does. `fingerprint`: SHA-256 of the weights file."""

    def __init__(self, weights: Path, device: str | torch.device = "cpu") -> None:
        """Load torch-fidelity's published weights file (weights-inception-2015-12-05-6726825d.pth).

        Raises:
            ConfigError: torch-fidelity is not installed.
            DataError: the file is missing, or is not this weights file.
        """
        network_class = _network_class()
        try:
            self.fingerprint = sha256_of_file(weights)
            # The network's own loader would execute code in the file, so first check that the file has only plain tensors.
            torch.load(weights, map_location="cpu", weights_only=True)
            network = network_class("inception", [FEATURES, LOGITS], feature_extractor_weights_path=str(weights))
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"Inception weights {weights}: {message}; expected torch-fidelity's file") from None
        exact_fp32()
        self.network, self.device = network.to(device), torch.device(device)

    @torch.inference_mode()
    def features(self, images_BHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """Extract features from uint8 images (B, H, W, 3).

        Returns:
            Features (B, 2048) for FID, and logits (B, 1008) for the Inception Score, both fp32.
        """
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(self.device)
        features_BD, logits_BK = self.network(images_BCHW)
        return features_BD, logits_BK


def _network_class() -> Any:
    # The package's __init__ imports torchvision for its other networks. This network does not need it, so bypass the __init__.
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError("extractor inception needs torch-fidelity: pip install --no-deps torch-fidelity")
    if "torch_fidelity" in sys.modules:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3
    bare = ModuleType("torch_fidelity")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = bare
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    finally:
        del sys.modules["torch_fidelity"]  # a later import must get the whole package
    return FeatureExtractorInceptionV3
