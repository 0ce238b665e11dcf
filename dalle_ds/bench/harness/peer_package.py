"""The package dalle-pytorch as the other side: import it, build its model, train one step, sample with its cache.

B batch, P image tokens read before, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dalle_ds.bench.harness.machine import Machine
from dalle_ds.bench.harness.model import training_step
from dalle_ds.bench.harness.settings import PriorBenchConfig
from dalle_ds.errors import UserError
from dalle_ds.ops.attention.masks import Pattern, layer_patterns

TYPES = {Pattern.ROW: "axial_row", Pattern.COLUMN: "axial_col", Pattern.CONV: "conv_like"}


@contextmanager
def _placeholders() -> Iterator[None]:
    """Placeholder modules for imports of the package that the measured code never uses: loaders of pretrained image codebooks
    (they need pytorch-lightning below 1.8) and pkg_resources, which setuptools has dropped."""
    names = {
        "taming": (),
        "taming.models": (),
        "taming.models.vqgan": ("VQModel", "GumbelVQ"),
        "omegaconf": ("OmegaConf",),
        "pkg_resources": ("get_distribution",),
    }
    before = {name: sys.modules.get(name) for name in names}
    for name, attributes in names.items():
        sys.modules[name] = ModuleType(name)
        for attribute in attributes:
            setattr(sys.modules[name], attribute, None)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def import_peer() -> Any:
    """Returns the package's main module.

    Raises:
        UserError: the package or one of its dependencies is not installed.
    """
    if find_spec("dalle_pytorch") is None:
        raise UserError(_missing("dalle_pytorch is not installed here"))
    try:
        with _placeholders():
            import dalle_pytorch.dalle_pytorch as peer
    except ImportError as error:
        raise UserError(_missing(f"dalle_pytorch is installed, but cannot be imported: {error}")) from None
    return peer


def _missing(what: str) -> str:
    return (
        f"{what}. It is not a dependency of this project. In a separate environment that also has this project, run\n"
        "  pip install dalle-pytorch==1.6.6\n"
        "or, to keep the installed torch and skip dependencies that the benchmark does not need,\n"
        "  pip install --no-deps dalle-pytorch==1.6.6 axial-positional-embedding rotary-embedding-torch requests\n"
        "To compare without it: --peers gpt2"
    )


def build_peer(settings: PriorBenchConfig, machine: Machine, layers: int, heads: int, *, conv: bool, cached: bool) -> nn.Module:
    """Returns the package's model, with its sparse attention types in the paper's order of patterns.

    Args:
        conv: use conv_like in the last layer; otherwise axial_row.
        cached: set `optimize_for_inference`. Without it, the cache of axial layers gives wrong logits, because all layers
            share one cache key; but training is faster without it.
    """
    peer = import_peer()
    torch.manual_seed(0)
    last = TYPES[Pattern.CONV if conv else Pattern.ROW]
    types = [*(TYPES[pattern] for pattern in layer_patterns(layers)[:-1]), last]
    # The model uses the VAE only for its sizes: one layer that halves the resolution, one channel. It is made at a size that is
    # a power of two, as its constructor demands, and then named another.
    vae = peer.DiscreteVAE(image_size=2, num_layers=1, num_tokens=settings.n_codes, codebook_dim=1, hidden_dim=1)
    vae.image_size = 2 * settings.grid
    model = peer.DALLE(
        dim=heads * settings.d_head,
        vae=vae,
        num_text_tokens=settings.vocab_size,
        text_seq_len=settings.text_len,
        depth=layers,
        heads=heads,
        dim_head=settings.d_head,
        attn_types=types,
        optimize_for_inference=cached,
    )
    return model.to(machine.device)


def peer_step(model: Any, batch: int, precision: AbstractContextManager[None]) -> Callable[[], None]:
    """Returns a function that trains the model on random tokens, one step per call."""
    device = model.logits_mask.device
    text = torch.randint(1, model.num_text_tokens - model.text_seq_len, (batch, model.text_seq_len), device=device)
    image = torch.randint(model.num_image_tokens, (batch, model.image_seq_len), device=device)

    def loss() -> Tensor:
        with precision:
            return model(text, image, return_loss=True)

    return training_step(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])


class PeerSampler:
    """The sampling loop of the package's `generate_images`, but with the cache passed to the model.

    `generate_images(use_cache=True)` drops the cache at the default `cond_scale` of 1, and reads all tokens again for each new
    token.
    """

    def __init__(self, model: Any, images: int) -> None:
        self.model, self.images, self.peer = model.eval(), images, import_peer()
        device = model.logits_mask.device
        generator = torch.Generator().manual_seed(0)
        n_text_tokens = model.num_text_tokens - model.text_seq_len  # the package's count includes padding tokens
        self.text_1T = torch.randint(1, n_text_tokens, (1, model.text_seq_len), generator=generator).to(device)
        self.image_1N = torch.randint(model.num_image_tokens, (1, model.image_seq_len), generator=generator).to(device)

    def go_to(self, position: int) -> None:
        """Read the caption and `position` image tokens once, then repeat the cache for all images.

        A prefill in one pass stores other values for the token shift than reading token by token. Time and shapes are the same.
        """
        cache: dict[Any, Any] = {}
        logits = self.model(self.text_1T, self.image_1N[:, :position], cache=cache)
        self.cache = tree_map_only(Tensor, lambda t: t.repeat_interleave(self.images, 0), cache)
        self.logits_BV = logits[:, -1].repeat_interleave(self.images, 0)
        self.text_BT = self.text_1T.repeat_interleave(self.images, 0)
        self.image_BP = self.image_1N[:, :position].repeat_interleave(self.images, 0)

    def step(self) -> None:
        """Sample a token as the package does (top half of the logits, Gumbel noise) and feed it to the model."""
        token_B = self.peer.gumbel_sample(self.peer.top_k(self.logits_BV)) - self.model.num_text_tokens
        self.image_BP = torch.cat([self.image_BP, token_B[:, None]], 1)
        self.logits_BV = self.model(self.text_BT, self.image_BP, cache=self.cache)[:, -1]
