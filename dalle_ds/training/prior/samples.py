"""Sample sheets during training of a prior: a few validation captions, with the same captions and seeds in every sheet.

Where the data are scenes, their score as well."""

# C captions, K candidates a caption, N image tokens

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.models.attention import use_attention
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.pretrained.stored_weights import build_dvae
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.request import seed_of
from dalle_ds.sampling.validation_samples import READ_AT_LEAST, validation_of
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE
from dalle_ds.storage.weights import read_weights
from dalle_ds.training.prior.scene_score import SceneScore, are_scenes

CAPTIONS, CANDIDATES = 6, 4
TEMPERATURE = 0.8  # at the paper's 1, samples of small models are too random to show what they have learned


class SampleSheets:
    """Generates sample sheets on one rank, in fp32. Keeps the dVAE and the captions in memory between sheets."""

    def __init__(self, config: PriorConfig, dataset: TokenDataset, device: torch.device, n_scene_captions: int = 0) -> None:
        """Raises DataError if the data set contains no dVAE weights.

        Args:
            dataset: the validation split.
            n_scene_captions: captions of the evaluation to score, where the validation captions are scenes.
        """
        self._config, self._device = config, device
        url = objects.join(dataset.root_url, DVAE_FILE)
        dvae = build_dvae(read_weights(url, "dvae", str(device)), url)
        self._dvae = dvae.eval().requires_grad_(False)
        validation = validation_of([dataset], config.text_len, READ_AT_LEAST)
        one_of_each = list({group: row for row, group in enumerate(validation.groups)}.values())
        self._validation = validation.take(one_of_each[:: -(-len(one_of_each) // CAPTIONS)])
        is_scored = n_scene_captions > 0 and are_scenes(validation.captions, dvae.config.image_size)
        self._scene_score = SceneScore(dataset, self._dvae, config.text_len, n_scene_captions) if is_scored else None

    def prior(self, weights: dict[str, Tensor]) -> Prior:
        """Return a prior to draw with.

        Args:
            weights: all weights of the prior, unsharded, by name.
        """
        with torch.device("meta"):
            prior = Prior(self._config)
        prior.load_state_dict({name: weight.to(self._device) for name, weight in weights.items()}, assign=True)
        use_attention(prior, "auto", self._device)
        return prior.eval().requires_grad_(False)

    def draw(self, prior: Prior, update: int) -> Callable[[], Image.Image]:
        """Sample now, and return a function that lays out the sheet, without the device. It has a row per caption: the real
        image, decoded from its codes, then samples of the prior."""
        captions = self._validation.captions
        seeds_CK = [[seed_of(0, caption, k) for k in range(CANDIDATES)] for caption in captions]
        codes_CKN = generate(prior, self._validation.text_ST, seeds_CK, temperature=TEMPERATURE)
        real_codes_C1N = self._validation.image_SN[:, None].to(codes_CKN)
        rows = [decode_images(self._dvae, codes_KN) for codes_KN in torch.cat([real_codes_C1N, codes_CKN], 1)]
        titles = ["real image, decoded", *(f"sample {k + 1}" for k in range(CANDIDATES))]
        title = f"Update {update}, temperature {TEMPERATURE:g}"
        return partial(image_grid, rows, captions, title=title, column_titles=titles)

    def scores(self, prior: Prior) -> dict[str, float]:
        """Return shares of scenes that are right, by metric name; nothing where the data are no scenes."""
        return {} if self._scene_score is None else self._scene_score.metrics(prior, TEMPERATURE)
