"""Sample sheets during training of a prior: a few validation captions, with the same captions and seeds in every sheet."""

# C captions, K candidates a caption, N image tokens

import torch
from PIL import Image
from torch import Tensor

from dalle_ds.data.token_dataset import TokenDataset
from dalle_ds.models.attention import use_attention
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.grid import image_grid
from dalle_ds.sampling.request import seed_of
from dalle_ds.sampling.validation_samples import READ_AT_LEAST, validation_of
from dalle_ds.storage import objects
from dalle_ds.storage.names import DVAE_FILE
from dalle_ds.storage.weights import read_weights

CAPTIONS, CANDIDATES = 6, 4
TEMPERATURE = 0.8  # at the paper's 1, samples of small models are too random to show what they have learned


class SampleSheets:
    """Generates sample sheets on one rank, in fp32. Keeps the dVAE and the captions in memory between sheets."""

    def __init__(self, config: PriorConfig, dataset: TokenDataset, device: torch.device) -> None:
        """Raises DataError if the data set contains no dVAE weights."""
        self._config, self._device = config, device
        saved = read_weights(objects.join(dataset.root_url, DVAE_FILE), "dvae", str(device))
        with torch.device("meta"):
            dvae = DVAE(DVAEConfig(**saved.config))
        dvae.load_state_dict(saved.state, assign=True)
        self._dvae = dvae.eval().requires_grad_(False)
        validation = validation_of([TokenDataset(dataset.root_url, "validation")], config.text_len, READ_AT_LEAST)
        one_of_each = list({group: row for row, group in enumerate(validation.groups)}.values())
        self._validation = validation.take(one_of_each[:: -(-len(one_of_each) // CAPTIONS)])

    def draw(self, weights: dict[str, Tensor], update: int) -> Image.Image:
        """Return a sheet with a row per caption: the real image, decoded from its codes, then samples of the prior.

        Args:
            weights: all weights of the prior, unsharded, by name.
        """
        with torch.device("meta"):
            prior = Prior(self._config)
        prior.load_state_dict({name: weight.to(self._device) for name, weight in weights.items()}, assign=True)
        use_attention(prior, "auto", self._device)
        captions = self._validation.captions
        seeds_CK = [[seed_of(0, caption, k) for k in range(CANDIDATES)] for caption in captions]
        prior = prior.eval().requires_grad_(False)
        codes_CKN = generate(prior, self._validation.text_ST, seeds_CK, temperature=TEMPERATURE)
        real_codes_C1N = self._validation.image_SN[:, None].to(codes_CKN)
        rows = [decode_images(self._dvae, codes_KN) for codes_KN in torch.cat([real_codes_C1N, codes_CKN], 1)]
        titles = ["real image, decoded", *(f"sample {k + 1}" for k in range(CANDIDATES))]
        return image_grid(rows, captions, title=f"Update {update}, temperature {TEMPERATURE:g}", column_titles=titles)
