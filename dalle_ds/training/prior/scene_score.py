"""The score of scenes while a prior trains: its samples for captions of the evaluation, judged exactly."""

# C captions, T text positions, N image tokens

from collections.abc import Sequence
from typing import Final

import torch
from PIL import Image

from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.data.tokens.dataset import TokenDataset
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export import text_tokens
from dalle_ds.sampling.generate import generate
from dalle_ds.sampling.request import seed_of
from dalle_ds.scenes.captions import meaning_of
from dalle_ds.scenes.mixture import N_KINDS, evaluation_captions
from dalle_ds.scenes.render import MIN_SIDE
from dalle_ds.scenes.score import score
from dalle_ds.storage import objects
from dalle_ds.storage.names import TOKENIZER_FILE

_BATCH: Final = 64  # captions at a time


class SceneScore:
    """Samples an image for each of up to `n_captions` captions, the same ones every time, and judges the images."""

    def __init__(self, dataset: TokenDataset, dvae: DVAE, text_len: int, n_captions: int) -> None:
        """Raises DataError if the data set contains no tokenizer."""
        self._dvae = dvae
        self._captions = evaluation_captions(-(-n_captions // N_KINDS))[:n_captions]
        tokenizer = CaptionTokenizer(objects.join(dataset.root_url, TOKENIZER_FILE))
        self._text_CT = text_tokens(tokenizer, self._captions, text_len)

    def metrics(self, prior: Prior, temperature: float) -> dict[str, float]:
        """Shares of right images: "scenes/seen/mean", "scenes/zero_shot/counting" and the like."""
        images: list[Image.Image] = []
        for text_CT, captions in zip(torch.split(self._text_CT, _BATCH), _split(self._captions), strict=True):
            seeds_C1 = [[seed_of(0, caption, 0)] for caption in captions]
            codes_C1N = generate(prior, text_CT, seeds_C1, temperature=temperature)
            images += decode_images(self._dvae, codes_C1N[:, 0])
        return {f"scenes/{name}": value for name, value in score(images, self._captions).metrics().items()}


def are_scenes(captions: Sequence[str], image_size: int) -> bool:
    """Whether images of this size in pixels with these captions are scenes that can be judged."""
    return image_size >= MIN_SIDE and all(meaning_of(caption) is not None for caption in captions)


def _split(captions: list[str]) -> list[list[str]]:
    return [captions[first : first + _BATCH] for first in range(0, len(captions), _BATCH)]
