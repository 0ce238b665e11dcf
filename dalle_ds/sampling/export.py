"""Open an export folder for sampling: load prior, dVAE and tokenizer, and check that they belong together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError
from dalle_ds.models.attention import use_attention
from dalle_ds.models.dvae import DVAE
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.padding import PAD
from dalle_ds.parallel.ranks import ALONE, Ranks
from dalle_ds.pretrained.stored_weights import dvae_config_of, fill
from dalle_ds.recipes import from_values
from dalle_ds.sampling.export_record import ExportRecord, read_export_record
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE, PRIOR_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import Weights, number_of, read_weights


class CutCaption(NamedTuple):
    """Index of a caption, the number of its tokens, and how many of them the prior reads."""

    row: int
    tokens: int
    read: int


def told_of_cut(cut: Sequence[CutCaption]) -> str:
    """A message about captions that are longer than the prior reads."""
    first = cut[0]
    more = f" ({len(cut)} captions are cut)" if len(cut) > 1 else ""
    return f"caption {first.row + 1} has {first.tokens} tokens, of which the prior reads the first {first.read}{more}"


@dataclass(frozen=True)
class Export:
    """An export of `dalle-ds export`, in memory."""

    url: str
    prior: Prior
    dvae: DVAE
    tokenizer: CaptionTokenizer
    record: ExportRecord
    ln_b_min: float | None = None
    """Lower limit of the decoder's ln b in training (`dvae.loss.ln_b_min`). None: no limit, or a weights file without it."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the prior's weights. Records of samples and scores contain it."""
        return self.record.fingerprint

    @property
    def dtype(self) -> Literal["fp16"] | None:
        """Format of the prior's residual branches. None: fp32."""
        is_half = any(parameter.dtype is torch.float16 for parameter in self.prior.parameters())
        return "fp16" if is_half else None

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def cut_captions(self, captions: Sequence[str]) -> list["CutCaption"]:
        """Returns the captions that are longer than the prior reads."""
        width = self.prior.config.text_len - 1
        lengths = [len(self.tokenizer.encode(caption)) for caption in captions]
        return [CutCaption(row, length, width) for row, length in enumerate(lengths) if length > width]

    def text(self, captions: list[str]) -> Tensor:
        """Encode captions as (C, T-1) int64, right-padded with PAD. Longer captions are truncated, as in training."""
        return text_tokens(self.tokenizer, captions, self.prior.config.text_len)


def fp16_in_memory(name: str) -> torch.dtype | None:
    """The dtype that a tensor of the prior has in memory if its residual branches compute in fp16. None: as stored."""
    return torch.float16 if ".branch." in name and name.endswith(".weight") else None


def text_tokens(tokenizer: CaptionTokenizer, captions: Sequence[str], text_len: int) -> Tensor:
    """`Export.text` without an export: (C, T-1), where T is `text_len`, which counts start-of-text."""
    text_CT = torch.full((len(captions), text_len - 1), PAD, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = tokenizer.encode(caption)[: text_len - 1]
        text_CT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return text_CT


@dataclass(frozen=True)
class _SmallFiles:
    """All of an export but the prior's weights. It can be pickled, so that one rank may read it for all."""

    record: ExportRecord
    tokenizer: bytes
    dvae: Weights

    @classmethod
    def read(cls, url: str | Path) -> "_SmallFiles":
        record = read_export_record(url)
        tokenizer = CaptionTokenizer(objects.join(url, TOKENIZER_FILE))
        require_same(f"tokenizer of export {url}", record.tokenizer, tokenizer.fingerprint, "Export the checkpoint again.")
        dvae = read_weights(objects.join(url, DVAE_FILE), "dvae")
        require_same(f"dVAE of export {url}", record.dvae, dvae.fingerprint, "Export the checkpoint again.")
        return cls(record, tokenizer.model_bytes, dvae)


def load_export(
    url: str | Path, device: str = "cpu", use_fp16: Callable[[nn.Module], None] | None = None, ranks: Ranks = ALONE
) -> Export:
    """Open an export folder and check that its parts belong together.

    All ranks must call it together. The main rank reads the small files for all; each reads the prior's weights.

    Args:
        use_fp16: makes the residual branches of the prior compute in fp16 (`dalle_ds.precision`). Their matrices are then fp16
            in memory too: 25 GB instead of 49 GB for 12 billion parameters. None: fp32.

    Raises:
        DataError: a file is missing or damaged, or the sizes of the parts do not match.
        FingerprintMismatch: the dVAE or the tokenizer is not the one that the prior was trained with.
    """
    small = ranks.once(lambda: _SmallFiles.read(url))
    record, dvae_weights = small.record, small.dvae
    tokenizer = CaptionTokenizer(small.tokenizer, objects.join(url, TOKENIZER_FILE))
    ln_b_min = number_of(dvae_weights.extra, "ln_b_min", objects.join(url, DVAE_FILE))
    # Load directly to the device: host memory holds one tensor at a time, and the model uses the loaded tensors without a copy.
    weights = read_weights(objects.join(url, PRIOR_FILE), "prior", device, fp16_in_memory if use_fp16 else lambda name: None)
    require_same(f"prior of export {url}", record.fingerprint, weights.fingerprint, "Export the checkpoint again.")

    config = from_values(PriorConfig, weights.config, f"config of the prior of export {url}")
    dvae_config = dvae_config_of(dvae_weights, objects.join(url, DVAE_FILE))
    for what, expected, found in (
        ("grid of the prior and of the dVAE", config.grid, dvae_config.grid),
        ("image vocabulary of the prior and of the dVAE", config.n_codes, dvae_config.n_codes),
        ("text vocabulary of the prior and of the tokenizer", config.vocab_size, tokenizer.vocab_size),
    ):
        if expected != found:
            raise DataError(f"export {url}: {what} differ: {expected} and {found}")
    with torch.device("meta"):  # skips initialization
        prior, dvae = Prior(config), DVAE(dvae_config)
    fill(prior, weights.state, f"export {url}: {PRIOR_FILE}")
    fill(dvae, dvae_weights.state, f"export {url}: {DVAE_FILE}")
    use_attention(prior, "auto", torch.device(device))
    if use_fp16 is not None:
        use_fp16(prior)
    exact_fp32()
    prior, dvae = prior.to(device).eval().requires_grad_(False), dvae.to(device).eval().requires_grad_(False)
    return Export(str(url), prior, dvae, tokenizer, record, ln_b_min)
