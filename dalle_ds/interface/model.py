"""A trained model in a program: samples, codes, images and losses, by the functions that the commands use.

B images or captions, N image tokens, H and W pixels.
"""

import io
from collections.abc import Sequence
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
from dalle_ds.sampling.export import Export
from dalle_ds.sampling.image_prompt import ImagePrompt, make_image_prompt, read_image_prompt
from dalle_ds.sampling.likelihood import image_losses
from dalle_ds.sampling.request import Request, SamplingConfig
from dalle_ds.sampling.sampler import Candidate, Sampler
from dalle_ds.sampling.scorer import Scorer, load_scorer

BATCH = 32  # images that the dVAE encodes at once

Codes = Tensor | np.ndarray | Sequence[Tensor]
"""Image tokens: integers (B, N), or a sequence of B tensors (N,)."""


class SampleOptions(TypedDict, total=False):
    """The options of `Model.sample`: fields of `SamplingConfig`, which has their defaults and bounds."""

    n: int
    keep: int | None
    temperature: float
    top_k: int
    top_p: float
    guidance: float
    seed: int
    batch: int


@dataclass(frozen=True, eq=False)
class Sample:
    """One image that was drawn for a caption.

    Attributes:
        image: RGB, `Model.image_size` pixels a side.
        score: how well the scorer finds that it fits the caption; None without a scorer.
        seed: of this image alone, as in samples.json.
        codes: int64 (N,), which `Model.decode` makes the image of.
    """

    image: Image.Image
    caption: str
    score: float | None
    seed: int
    codes: Tensor


@dataclass(frozen=True, eq=False)
class Loss:
    """Negative log-likelihood of images given their captions, in nats a token.

    Attributes:
        per_sample: float32 (B,), the mean over each image's tokens.
        per_token: float32 (B, N), in raster order.
    """

    per_sample: Tensor
    per_token: Tensor


class Model:
    """An export in memory: prior, dVAE, tokenizer and, where there is one, a scorer. `dalle_ds.load` makes it.

    Tensors that come out are on the CPU. Several threads may share a model: it draws for one of them at a time.
    """

    def __init__(self, export: Export, scorer: Scorer | None = None) -> None:
        self._export, self._scorer = export, scorer
        self._loaded: dict[str, Scorer] = {}  # scorers that calls named
        self._one_at_a_time = Lock()

    def __repr__(self) -> str:
        about = f"{self.image_size} pixels, {self.grid}x{self.grid} tokens of {self.n_codes} codes, on {self.device}"
        return f"<dalle_ds.Model {self._export.url}: {about}>"

    @property
    def image_size(self) -> int:
        """Pixels a side of the images."""
        return self._export.dvae.config.image_size

    @property
    def grid(self) -> int:
        """Image tokens a side: N = grid * grid."""
        return self._export.dvae.config.grid

    @property
    def n_codes(self) -> int:
        """Size of the codebook: codes are 0 to n_codes - 1."""
        return self._export.dvae.config.n_codes

    @property
    def text_len(self) -> int:
        """Text slots of the prior, as `dalle_ds.data.open` takes it: captions are cut to text_len - 1 tokens."""
        return self._export.prior.config.text_len

    @property
    def fingerprint(self) -> str:
        """Of the prior's weights; records of samples and scores carry it."""
        return self._export.fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
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
        """Draw images for captions: pixel for pixel those of `dalle-ds sample` with the same options.

        Args:
            captions: one, or several.
            scorer: what chooses among candidates: a CLIP's folder or hub name, or an object with the methods of
                `dalle_ds.Scorer`. None: the scorer that the model was loaded with.
            image_prompt: image-to-image: the top `prompt_rows` rows of its codes are kept, the rest is drawn. A file, a file's
                bytes, or a PIL image, which counts as its PNG file. Captions may then be empty: "" draws variations.
            prompt_rows: 0 to grid - 1; None: the paper's share, 15 of 32.
            n: candidates for each caption.
            keep: the best of them by the scorer; None: all.
            temperature: the paper's is 1; 0 takes the likeliest token.
            top_k: 0 keeps all tokens, as the paper.
            top_p: 1 keeps all tokens, as the paper.
            guidance: of captions over none; 1 leaves it out, as the paper.
            seed: of the whole call.
            batch: images drawn at once.

        Returns:
            For one caption a list of `Sample`, best first; for several a list of such lists.

        Raises:
            UserError: what cannot be drawn, as the command says it; a scorer or an image that cannot be read.
        """
        settings = from_values(SamplingConfig, options, "Model.sample")
        if prompt_rows is not None and image_prompt is None:
            raise ConfigError(f"prompt_rows {prompt_rows} without an image: expected an image_prompt")
        prompt = self._image_prompt(image_prompt, prompt_rows)
        request = Request((captions,) if isinstance(captions, str) else tuple(captions), settings, prompt)
        sampler = Sampler(self._export, self._scorer_of(scorer))
        with self._one_at_a_time:
            chosen = sampler.draw(request)
            samples = [self._samples(sampler, request, candidates) for candidates in chosen]
        return samples[0] if isinstance(captions, str) else samples

    def encode(self, images: Images, *, keys: Sequence[str] | None = None) -> Tensor:
        """Images -> codes, int64 (B, N) in raster order, as preprocessing encodes them in fp32.

        Images are cropped by the rule of the training data, near the middle. One of just image_size pixels stays whole.

        Args:
            images: one PIL image, a sequence of PIL images of any sizes, a numpy array uint8 (B, H, W, 3), or a torch tensor
                uint8 (B, 3, H, W).
            keys: decide where the crops are, one for each image: the key of a sample gives the codes that the encode stage
                writes for it. None: the image's own pixels decide.

        Raises:
            UserError: not such images, or smaller than image_size.
        """
        crops_BHWC = crops_of(images, self.image_size, keys)
        codes = []
        with torch.inference_mode():
            for start in range(0, len(crops_BHWC), BATCH):
                images_BCHW = torch.from_numpy(crops_BHWC[start : start + BATCH]).permute(0, 3, 1, 2).to(self.device)
                codes.append(self._export.dvae.tokens(images_BCHW).cpu())
        return torch.cat(codes)

    def decode(self, codes: Codes) -> list[Image.Image]:
        """Codes -> RGB images of image_size pixels a side, as `Sample.image`.

        Args:
            codes: integers (B, N), a tensor or a numpy array, or a sequence of tensors (N,).

        Raises:
            UserError: another shape or type, or codes that the codebook does not have.
        """
        return decode_images(self._export.dvae, self._codes_of(codes))

    def loss(self, captions: Sequence[str], images: Images | Codes, *, batch: int = 16) -> Loss:
        """How unlikely the prior finds images given their captions, as `dalle-ds evaluate` computes it.

        Args:
            captions: one for each image; captions are cut to text_len - 1 tokens, as in training.
            images: as `encode` takes them, or codes as `decode` takes them.
            batch: images at once; only the rounding depends on it.

        Raises:
            UserError: not one caption for each image; what `encode` or `decode` refuse.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        codes_BN = self._codes_of(cast(Codes, images)) if _are_codes(images) else self.encode(cast(Images, images))
        if len(captions) != len(codes_BN):
            raise DataError(f"{len(captions)} captions for {len(codes_BN)} images: expected one for each")
        if batch < 1:
            raise ConfigError(f"batch {batch}: expected at least 1")
        losses_BN = torch.from_numpy(image_losses(self._export.prior, self._export.text(captions), codes_BN, batch=batch))
        return Loss(losses_BN.mean(1), losses_BN)

    # ---- parts of the above --------------------------------------------------------------------------------------------

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
            raise DataError(f"codes are no tensor of one shape ({error}): {expected}") from None
        is_integer = not (codes_BN.is_floating_point() or codes_BN.is_complex() or codes_BN.dtype == torch.bool)
        if not is_integer or codes_BN.ndim != 2 or codes_BN.shape[1] != self.grid**2:
            raise DataError(f"codes are {codes_BN.dtype} {tuple(codes_BN.shape)}: {expected}")
        codes_BN = codes_BN.detach().cpu().long()
        if codes_BN.numel() and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < self.n_codes:
            raise DataError(f"codes run from {int(codes_BN.min())} to {int(codes_BN.max())}: {expected}")
        return codes_BN


def open_scorer(scorer: str | Path | Scorer, device: str | torch.device) -> Scorer:
    """A CLIP by its folder or hub name; another scorer as it is. Raises ConfigError where it is neither."""
    if isinstance(scorer, str | Path):
        return load_scorer(scorer, device)
    if not callable(getattr(scorer, "scores", None)):
        raise ConfigError(f"scorer is a {type(scorer).__name__}: expected a CLIP's folder or hub name, or a dalle_ds.Scorer")
    return scorer


def _are_codes(images: Images | Codes) -> bool:
    """Whether these are codes rather than images, by the number of dimensions."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 2
    return isinstance(images, Sequence) and len(images) > 0 and all(isinstance(one, Tensor) for one in images)
