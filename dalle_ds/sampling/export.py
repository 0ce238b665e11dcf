"""Open an export folder for sampling: load prior, dVAE and tokenizer, and check that they belong together."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dalle_ds.data.tokenizer import CaptionTokenizer
from dalle_ds.errors import DataError
from dalle_ds.models.attention import use_attention
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.padding import PAD
from dalle_ds.sampling.export_record import ExportRecord, read_export_record
from dalle_ds.storage import objects
from dalle_ds.storage.fingerprint import require_same
from dalle_ds.storage.names import DVAE_FILE, PRIOR_FILE, TOKENIZER_FILE
from dalle_ds.storage.weights import read_weights


@dataclass(frozen=True)
class Export:
    """An export of `dalle-ds export`, in memory."""

    url: str
    prior: Prior
    dvae: DVAE
    tokenizer: CaptionTokenizer
    record: ExportRecord

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the prior's weights. Records of samples and scores contain it."""
        return self.record.fingerprint

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def text(self, captions: list[str]) -> Tensor:
        """Encode captions as (C, T-1) int64, right-padded with PAD. Longer captions are truncated, as in training."""
        width = self.prior.config.text_len - 1
        text_CT = torch.full((len(captions), width), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            ids = self.tokenizer.encode(caption)[:width]
            text_CT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return text_CT


def load_export(url: str | Path, device: str = "cpu") -> Export:
    """Open an export folder and check that its parts belong together.

    Raises:
        DataError: a file is missing or damaged, or the sizes of the parts do not match.
        FingerprintMismatch: the dVAE or the tokenizer is not the one that the prior was trained with.
    """
    record = read_export_record(url)
    tokenizer = CaptionTokenizer(objects.join(url, TOKENIZER_FILE))
    require_same(f"tokenizer of export {url}", record.tokenizer, tokenizer.fingerprint, "Export the checkpoint again.")
    dvae_weights = read_weights(objects.join(url, DVAE_FILE), "dvae", device)
    require_same(f"dVAE of export {url}", record.dvae, dvae_weights.fingerprint, "Export the checkpoint again.")
    # Load directly to the device: host memory holds one tensor at a time, and the model uses the loaded tensors without a copy.
    weights = read_weights(objects.join(url, PRIOR_FILE), "prior", device)
    require_same(f"prior of export {url}", record.fingerprint, weights.fingerprint, "Export the checkpoint again.")

    config, dvae_config = PriorConfig(**weights.config), DVAEConfig(**dvae_weights.config)
    for what, expected, found in (
        ("grid of the prior and of the dVAE", config.grid, dvae_config.grid),
        ("image vocabulary of the prior and of the dVAE", config.n_codes, dvae_config.n_codes),
        ("text vocabulary of the prior and of the tokenizer", config.vocab_size, tokenizer.vocab_size),
    ):
        if expected != found:
            raise DataError(f"export {url}: {what} differ: {expected} and {found}")
    with torch.device("meta"):  # skips initialization
        prior, dvae = Prior(config), DVAE(dvae_config)
    prior.load_state_dict(weights.state, assign=True)
    dvae.load_state_dict(dvae_weights.state, assign=True)
    use_attention(prior, "auto", torch.device(device))
    exact_fp32()
    prior, dvae = prior.to(device).eval().requires_grad_(False), dvae.to(device).eval().requires_grad_(False)
    return Export(str(url), prior, dvae, tokenizer, record)
