"""The Python interface of a trained model: sample, encode, decode, loss. It uses the same functions as the commands.

B images or captions, N image tokens, H and W pixels.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypedDict, Unpack, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.interface.images import Images, crops_of
from dalle_ds.recipes import from_values
from dalle_ds.sampling.decode import decode_images
from dalle_ds.sampling.export import Export, told_of_cut
from dalle_ds.sampling.image_prompt import ImagePrompt, make_image_prompt, read_image_prompt
from dalle_ds.sampling.likelihood import image_losses
from dalle_ds.sampling.request import Request
from dalle_ds.sampling.sampler import Candidate, Sampler
from dalle_ds.sampling.scorer import Scorer, load_scorer
from dalle_ds.sampling.settings import SampleOptionsConfig

log = logging.getLogger(__name__)

BATCH = 32  # images per batch of the dVAE's encoder

Codes = Tensor | np.ndarray | Sequence[Tensor]
"""Image tokens: integers (B, N), or a sequence of B tensors (N,)."""


class SampleOptions(TypedDict, total=False):
    """Options of `Model.sample`: the fields of `SampleOptionsConfig`, which defines their defaults and bounds."""

    n: int
    keep: int | None
    temperature: float | None
    top_k: int
    top_p: float
    guidance: float | None
    seed: int
    batch: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One image that was sampled for a caption.

    Attributes:
        image: RGB image, `Model.image_size` pixels per side.
        score: the scorer's score of image and caption, higher is better. None without a scorer.
        seed: seed of this image, as in samples.json.
        codes: image tokens, int64 (N,). `Model.decode` decodes them to the image.
    """

    image: Image.Image
    caption: str
    score: float | None
    seed: int
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Loss:
    """Negative log-likelihood of images given their captions, in nats per token.

    Attributes:
        per_sample: float32 (B,), the mean over the tokens of each image.
        per_token: float32 (B, N), in raster order.
    """

    per_sample: Tensor
    per_token: Tensor


class Model:
    """An export in memory: prior, dVAE, tokenizer and an optional scorer. `dalle_ds.load` creates it.

    Returned tensors are on the CPU. Several threads may share a model; it runs one call of `sample` at a time.
    """

    def __init__(self, export: Export, scorer: Scorer | None = None) -> None:
        self._export, self._scorer = export, scorer
        self._loaded: dict[str, Scorer] = {}  # scorers that were named in calls of `sample`
        self._one_at_a_time = Lock()

    def __repr__(self) -> str:
        about = f"{self.image_size} pixels, {self.grid}x{self.grid} tokens of {self.n_codes} codes, on {self.device}"
        return f"<dalle_ds.Model {self._export.url}: {about}>"

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self._export.dvae.config.image_size

    @property
    def grid(self) -> int:
        """Side of the token grid: N = grid * grid."""
        return self._export.dvae.config.grid

    @property
    def n_codes(self) -> int:
        """Size of the codebook: codes are 0 to n_codes - 1."""
        return self._export.dvae.config.n_codes

    @property
    def text_len(self) -> int:
        """Text positions of the prior: `text_len` of `dalle_ds.data.open`. Captions are truncated to text_len - 1 tokens."""
        return self._export.prior.config.text_len

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the prior's weights. Records of samples and scores contain it."""
        return self._export.fingerprint

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._export.device

    @overload
    def sample(
        self,
        captions: str,
        *,
        scorer: str | Path | Scorer | None = None,
        image_prompt: str | Path | bytes | Image.Image | None = None,
        prompt_rows: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> list[Sample]: ...

    @overload
    def sample(
        self,
        captions: list[str] | tuple[str, ...],
        *,
        scorer: str | Path | Scorer | None = None,
        image_prompt: str | Path | bytes | Image.Image | None = None,
        prompt_rows: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> list[list[Sample]]: ...

    def sample(
        self,
        captions: str | Sequence[str],
        *,
        scorer: str | Path | Scorer | None = None,
        image_prompt: str | Path | bytes | Image.Image | None = None,
        prompt_rows: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> list[Sample] | list[list[Sample]]:
        """Sample images for captions. They equal those of `dalle-ds sample` with the same options pixel for pixel.

        Args:
            captions: one caption, or several.
            scorer: scorer that ranks the candidates: a CLIP's folder or hub name, or an object with the methods of
                `dalle_ds.Scorer`. If None: the scorer that the model was loaded with.
            image_prompt: image for image-to-image: the top `prompt_rows` rows of its codes are kept, and the rest is sampled. A
                file, the bytes of a file, or a PIL image, which is treated as its PNG file. A caption may then be empty: ""
                samples variations of the image.
            prompt_rows: rows of codes to keep, 0 to grid - 1. If None, the paper's fraction: 15 of 32.
            n: candidates per caption.
            keep: keep only this many candidates, the best by score. If None, all.
            temperature: softmax temperature. The paper's is 1; 0 takes the most likely token. If None: the value that the
                export is meant for, or 1 if it names none.
            top_k: sample only from the k most likely tokens. 0 keeps all tokens, as in the paper.
            top_p: sample only from the smallest set of most likely tokens that together have this probability. 1 keeps all
                tokens, as in the paper.
            guidance: scale of classifier-free guidance by the caption. 1: none, as in the paper. If None: as `temperature`.
            seed: seed of the call, from which the seed of each image is derived.
            batch: images per batch.

        Returns:
            For one caption, a list of `Sample`, best first. For several captions, a list of such lists.

        Raises:
            UserError: invalid options with the message of the command, or a scorer or image that cannot be read.
        """
        asked = from_values(SampleOptionsConfig, options, "Model.sample", ("image_prompt", "prompt_rows", "scorer"))
        if prompt_rows is not None and image_prompt is None:
            raise ConfigError(f"prompt_rows {prompt_rows} without an image prompt: expected image_prompt as well")
        prompt = self._image_prompt(image_prompt, prompt_rows)
        request = Request(_captions_of(captions), asked.for_prior(self._export.record.sampling), prompt)
        sampler = Sampler(self._export, self._scorer_of(scorer))
        if cut := self._export.cut_captions(request.captions):
            log.warning("%s", told_of_cut(cut))
        with self._one_at_a_time:
            chosen = sampler.draw(request)
            samples = [self._samples(sampler, request, candidates) for candidates in chosen]
        return samples[0] if isinstance(captions, str) else samples

    def encode(self, images: Images, *, keys: Sequence[str] | None = None) -> Tensor:
        """Encode images to codes, int64 (B, N) in raster order, as preprocessing does in fp32.

        Images are cropped near the middle, as in the training data. An image of exactly image_size pixels per side is not
        cropped.

        Args:
            images: one PIL image, a sequence of PIL images of any sizes, a numpy array uint8 (B, H, W, 3), or a torch tensor
                uint8 (B, 3, H, W).
            keys: one seed per image for the position of its crop. The key of a sample gives the same codes as the encode stage.
                If None, the pixels of the image are the seed.

        Raises:
            UserError: another type or shape, or an image smaller than image_size.
        """
        crops_BHWC = crops_of(images, self.image_size, keys)
        codes = []
        with torch.inference_mode():
            for start in range(0, len(crops_BHWC), BATCH):
                images_BCHW = torch.from_numpy(crops_BHWC[start : start + BATCH]).permute(0, 3, 1, 2).to(self.device)
                codes.append(self._export.dvae.tokens(images_BCHW).cpu())
        return torch.cat(codes)

    def decode(self, codes: Codes) -> list[Image.Image]:
        """Decode codes to RGB images, image_size pixels per side, as `Sample.image`.

        Args:
            codes: integers (B, N) in a tensor or a numpy array, or a sequence of tensors (N,).

        Raises:
            UserError: another shape or type, or codes that are not in the codebook.
        """
        return decode_images(self._export.dvae, self._codes_of(codes))

    def loss(self, captions: Sequence[str], images: Images | Codes, *, batch: int = 16) -> Loss:
        """Negative log-likelihood of images given their captions, computed as in `dalle-ds eval loss`.

        Args:
            captions: one per image. Captions are truncated to text_len - 1 tokens, as in training.
            images: images as for `encode`, or codes as for `decode`.
            batch: images per batch. Only rounding depends on it.

        Raises:
            UserError: not one caption per image, or as `encode` and `decode`.
        """
        captions = _captions_of(captions)
        if isinstance(images, Sequence) and any(isinstance(one, list | tuple) for one in images):
            raise DataError("images are nested lists: expected images, or codes as a tensor or numpy array of integers (B, N)")
        codes_BN = self._codes_of(cast(Codes, images)) if _are_codes(images) else self.encode(cast(Images, images))
        if len(captions) != len(codes_BN):
            raise DataError(f"{len(captions)} captions for {len(codes_BN)} images: expected one caption per image")
        if batch < 1:
            raise ConfigError(f"batch {batch}: expected at least 1")
        losses_BN = torch.from_numpy(image_losses(self._export.prior, self._export.text(captions), codes_BN, batch=batch))
        return Loss(losses_BN.mean(1), losses_BN)

    # ---- helpers -------------------------------------------------------------------------------------------------------

    def _scorer_of(self, scorer: str | Path | Scorer | None) -> Scorer | None:
        if scorer is None:
            return self._scorer
        if not isinstance(scorer, str | Path):
            return open_scorer(scorer, self.device)
        name = str(scorer)
        if name not in self._loaded:
            self._loaded[name] = open_scorer(name, self.device)
        return self._loaded[name]

    def _image_prompt(self, image: str | Path | bytes | Image.Image | None, rows: int | None) -> ImagePrompt | None:
        if image is None:
            return None
        if isinstance(image, str | Path):
            return read_image_prompt(self._export, Path(image), rows)
        if isinstance(image, Image.Image):
            file = io.BytesIO()
            image.save(file, "png")
            image = file.getvalue()
        return make_image_prompt(self._export, image, rows)

    def _samples(self, sampler: Sampler, request: Request, candidates: list[Candidate]) -> list[Sample]:
        images = sampler.images(candidates)
        return [
            Sample(image, request.captions[found.index.caption], found.score, found.seed, found.codes_N.long())
            for found, image in zip(candidates, images, strict=True)
        ]

    def _codes_of(self, codes: Codes) -> Tensor:
        expected = f"expected integers (B, {self.grid**2}) from 0 to {self.n_codes - 1}"
        try:
            codes_BN = torch.as_tensor(codes) if isinstance(codes, np.ndarray | Tensor) else torch.stack(list(codes))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"codes do not form one tensor ({error}): {expected}") from None
        is_integer = not (codes_BN.is_floating_point() or codes_BN.is_complex() or codes_BN.dtype == torch.bool)
        if not is_integer or codes_BN.ndim != 2 or codes_BN.shape[1] != self.grid**2:
            raise DataError(f"codes are {codes_BN.dtype} {tuple(codes_BN.shape)}: {expected}")
        codes_BN = codes_BN.detach().cpu().long()
        if codes_BN.numel() and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < self.n_codes:
            raise DataError(f"codes range from {int(codes_BN.min())} to {int(codes_BN.max())}: {expected}")
        return codes_BN


def open_scorer(scorer: str | Path | Scorer, device: str | torch.device) -> Scorer:
    """Load a CLIP by its folder or hub name. A scorer object is returned unchanged. Raises ConfigError if it is neither."""
    if isinstance(scorer, str | Path):
        return load_scorer(scorer, device)
    if not callable(getattr(scorer, "scores", None)):
        raise ConfigError(f"scorer is a {type(scorer).__name__}: expected a CLIP's folder or hub name, or a dalle_ds.Scorer")
    return scorer


def _captions_of(captions: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(captions, str):
        return (captions,)
    found = tuple(captions) if isinstance(captions, Iterable) else (captions,)
    if not all(isinstance(caption, str) for caption in found):
        raise DataError(f"captions are {captions!r:.80}: expected a caption or a list of captions")
    return found


def _are_codes(images: Images | Codes) -> bool:
    """Whether the input is codes, not images: an array or tensor with two dimensions, or a sequence of tensors."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 2
    return isinstance(images, Sequence) and len(images) > 0 and all(isinstance(one, Tensor) for one in images)
