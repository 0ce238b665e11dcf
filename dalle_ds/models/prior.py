"""The prior: a decoder-only sparse transformer over text and image tokens (paper section 2.2, appendix B).

Slots: [start-of-text, up to T-1 text tokens, pads] then [start-of-image, the first N-1 image tokens]; slot i < T-1 predicts
text token i, slot T+j predicts image token j. The paper does not say whether its two start tokens count within 256 + 1024;
with both inside, the sequence is exactly 1280 = 40 blocks of 32, the block size of its kernels.

B batch, T text slots, N image tokens, L = T + N slots, D model width, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle_ds.models.attention import LayerCache, SelfAttention
from dalle_ds.models.resblock import MLP, Linear, ResBlock
from dalle_ds.ops.attention.masks import Pattern, SparseMask, layer_patterns
from dalle_ds.ops.cross_entropy import linear_cross_entropy, linear_nll
from dalle_ds.padding import PAD
from dalle_ds.recipes import Config

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8
"""Weights of the two per-modality means in the training loss (paper section 2.2)."""


class PriorConfig(Config):
    """Geometry of the prior; the defaults are the paper's 12-billion-parameter model."""

    n_layers: int = Field(64, ge=1)
    n_heads: int = Field(62, ge=1)
    d_head: int = Field(64, ge=1)
    text_len: int = Field(256, ge=2, description="text slots, start-of-text included")
    grid: int = Field(32, ge=1, description="image tokens a side")
    vocab_size: int = Field(16384, ge=1)
    n_codes: int = Field(8192, ge=2)
    conv_kernel: int = Field(11, ge=1, description="side of the last layer's window, odd")

    @model_validator(mode="after")
    def _check(self) -> "PriorConfig":
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel is {self.conv_kernel}, expected an odd number: the window is centred")
        return self

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head

    @property
    def n_image(self) -> int:
        return self.grid * self.grid

    @property
    def n_slots(self) -> int:
        return self.text_len + self.n_image

    def mask(self, pattern: Pattern) -> SparseMask:
        """Which keys the layers with this pattern see."""
        return SparseMask(pattern, self.text_len, self.grid, self.conv_kernel)


class NLL(NamedTuple):
    """Summed negative log-likelihoods in nats, fp32 scalars, and the number of targets in each sum."""

    text_sum: Tensor
    n_text: Tensor
    image_sum: Tensor
    n_image: Tensor


class SlotEmbedding(nn.Module):
    """Tokens to vectors, fp32 (paper appendix B.1, figure 10, and D item 2)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        # empty as the others are: `initialise` draws all, and a model on "meta" is made without torch's compiler
        self.text = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, d), freeze=False)
        self.image = nn.Embedding.from_pretrained(torch.empty(config.n_codes, d), freeze=False)
        self.start_of_text = nn.Parameter(torch.empty(d))
        self.start_of_image = nn.Parameter(torch.empty(d))
        self.text_position = nn.Parameter(torch.empty(config.text_len, d))
        # One learned vector for each text position, used where there is no token. Pads are ordinary keys, not masked out:
        # the paper found that this generalises better to captions unlike the training ones.
        self.pad = nn.Parameter(torch.empty(config.text_len, d))
        self.row = nn.Parameter(torch.empty(config.grid, d))
        self.column = nn.Parameter(torch.empty(config.grid, d))

    def forward(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """text (B, T-1), image (B, N) -> (B, L, D): all slots. The last image token is only ever a target."""
        return torch.cat([self.text_slots(text_BT), self.image_slots(image_BN[:, :-1])], 1)

    def text_slots(self, text_BT: Tensor) -> Tensor:
        """text (B, T-1) int64, PAD where empty -> (B, T, D): start-of-text, then tokens or pads."""
        start = (self.start_of_text + self.text_position[0]).expand(text_BT.shape[0], 1, -1)
        tokens = self.text(text_BT.clamp(min=0)) + self.text_position[1:]
        # the pad vector takes the place of token plus position: both would be learned per position anyway
        rest = torch.where((text_BT == PAD)[:, :, None], self.pad[1:], tokens)
        return torch.cat([start, rest], 1)

    def image_slots(self, previous_BN: Tensor) -> Tensor:
        """The first image slots: start-of-image, then the tokens given (B, n) -> (B, n + 1, D)."""
        start = self.start_of_image.expand(previous_BN.shape[0], 1, -1)
        x = torch.cat([start, self.image(previous_BN)], 1)
        return x + self._cell_positions(torch.arange(x.shape[1], device=x.device))

    def image_slot(self, previous_B: Tensor, slot_1: Tensor) -> Tensor:
        """One image slot after the first, which holds the token of the cell before -> (B, 1, D)."""
        return self.image(previous_B)[:, None] + self._cell_positions(slot_1)

    def _cell_positions(self, cells_n: Tensor) -> Tensor:
        """A slot carries the row and column of the cell that it predicts. -> (n, D)"""
        return self.row[cells_n // self.config.grid] + self.column[cells_n % self.config.grid]


class Unembedding(Linear):
    """Scores of one modality's tokens, fp32 whatever the caller's autocast; `ignore_index` marks targets that are none.

    Losses are made in here, not from its logits: all logits of a batch never exist at once. And parameters are read where the
    module is called, which is when engines that shard them gather them.
    """

    def __init__(self, d_model: int, vocab: int, ignore_index: int | None = None) -> None:
        super().__init__(d_model, vocab)
        self.ignore_index = ignore_index

    def forward(
        self, x_BLD: Tensor, targets_BL: Tensor | None = None, *, n_targets: int | None = None, per_token: bool = False
    ) -> Tensor:
        """-> logits (B, L, V), or given targets the sum of their losses in nats, or with `per_token` each of them (B, L).

        `n_targets`: how many of the targets are some, where the caller knows; else a GPU is asked and waited for.
        """
        if targets_BL is None:
            with torch.autocast(x_BLD.device.type, enabled=False):
                return self.matmul(x_BLD.float(), self.weight.float(), self.bias.float())
        rows = x_BLD.flatten(0, -2), self.weight, self.bias, targets_BL.flatten(), self.ignore_index
        return linear_nll(*rows).view_as(targets_BL) if per_token else linear_cross_entropy(*rows, n_kept=n_targets)


class Heads(nn.Module):
    """Final norm and one fp32 unembedding for each modality: a slot never scores tokens of the other kind."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.text = Unembedding(config.d_model, config.vocab_size, ignore_index=PAD)
        self.image = Unembedding(config.d_model, config.n_codes)

    def forward(self, x_BLD: Tensor, modality: str, targets_BL: Tensor | None = None, **options: Any) -> Tensor:
        """What the unembedding of `modality`, "text" or "image", gives: logits (B, L, V) fp32, or losses given targets."""
        return self.get_submodule(modality)(self.norm(x_BLD), targets_BL, **options)


class Layer(nn.Module):
    """Attention and MLP, two residual blocks: each has its own gradient scale."""

    def __init__(self, config: PriorConfig, attention: SelfAttention) -> None:
        super().__init__()
        self.attention = ResBlock(config.d_model, attention)
        self.mlp = ResBlock(config.d_model, MLP(config.d_model))
        self.run_blocks: Callable[[Tensor], Tensor] | None = None
        """In place of `blocks`: activation checkpointing puts its own function here."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return (self.run_blocks or self.blocks)(x_BLD)

    def blocks(self, x_BLD: Tensor) -> Tensor:
        """One after the other, (B, L, D) -> (B, L, D)."""
        return self.mlp(self.attention(x_BLD))

    def prefill(self, x_BLD: Tensor) -> tuple[Tensor, LayerCache]:
        """The first slots of a sequence, and what later ones need of them."""
        x_BLD, h_BLD = self.attention.to_branch(x_BLD)
        y_BLD, cache = self.attention.branch.prefill(h_BLD)
        return self.mlp(self.attention.from_branch(x_BLD, y_BLD)), cache

    def decode(self, x_B1D: Tensor, cache: LayerCache, slot_1: Tensor) -> Tensor:
        """Image slot `slot` after those in the cache."""
        x_B1D, h_B1D = self.attention.to_branch(x_B1D)
        y_B1D = self.attention.branch.decode(h_B1D, cache, slot_1)
        return self.mlp(self.attention.from_branch(x_B1D, y_B1D))


@dataclass
class DecodingCache:
    """All that decoding goes on from. Its tensors keep their shapes and places: a CUDA graph of one step serves all steps."""

    layers: list[LayerCache]
    slot_1: Tensor
    """The image slot that the next token goes to, (1,) int64."""

    def expand(self, n: int) -> "DecodingCache":
        """The same past for n candidates of each caption: what was computed is shared or copied, not computed again."""
        return DecodingCache([layer.expand(n) for layer in self.layers], self.slot_1.clone())


class Prior(nn.Module):
    """The sparse transformer. Plain single-device fp32 code; precision, sharding and recomputation are applied from outside."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = SlotEmbedding(config)
        self.layers = nn.ModuleList(
            Layer(config, SelfAttention(config.n_heads, config.d_head, config.mask(pattern)))
            for pattern in layer_patterns(config.n_layers)
        )
        self.heads = Heads(config)
        self.run_layer: Callable[[Layer, Tensor], Tensor] = lambda layer, x: layer(x)
        """How a layer is called: what is to happen between layers is put here."""

    def forward(self, text_BT: Tensor, image_BN: Tensor, *, n_text: int | None = None, per_token: bool = False) -> NLL | Tensor:
        """text (B, T-1) int64 with PAD at the right, image (B, N) int64 -> summed losses of both modalities,
        or with `per_token` what `image_nll` gives (engines that shard parameters can only be called, not asked by method).

        Text targets are real tokens only (whether pads were targets in the paper is not stated). Sums, not means: the
        weighting of paper section 2.5 needs counts over the whole global batch, which only the trainer knows.

        `n_text`: the number of text tokens in this batch; without it a GPU is asked and waited for.
        """
        if per_token:
            return self.image_nll(text_BT, image_BN)
        x = self._hidden(text_BT, image_BN)
        first_image = self.config.text_len
        text_sum = self.heads(x[:, : first_image - 1], "text", text_BT, n_targets=n_text)
        image_sum = self.heads(x[:, first_image:], "image", image_BN)
        n_image = torch.full((), image_BN.numel(), device=image_BN.device)  # filled there: a copy from here would be waited for
        return NLL(text_sum, (text_BT != PAD).sum(), image_sum, n_image)

    def image_nll(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """-> (B, N) nats of every image token given its caption and the tokens before it."""
        x = self._hidden(text_BT, image_BN)[:, self.config.text_len :]
        return self.heads(x, "image", image_BN, per_token=True)

    def image_logits(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """-> (B, N, V) fp32 logits of every image token: what tests compare the loss and token-by-token decoding with."""
        return self.heads(self._hidden(text_BT, image_BN)[:, self.config.text_len :], "image")

    def _hidden(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        x = self.embed(text_BT, image_BN)
        for layer in self.layers:
            x = self.run_layer(layer, x)
        return x

    # ---- token by token -----------------------------------------------------------------------------------------------

    def prefill(self, text_CT: Tensor, prime_CP: Tensor | None = None) -> tuple[Tensor, DecodingCache]:
        """Read captions (C, T-1), start-of-image and the first P < N image tokens of each, none by default
        -> logits (C, V) of image token P, and the cache to go on with.
        """
        prime_CP = text_CT[:, :0] if prime_CP is None else prime_CP
        x_CLD = torch.cat([self.embed.text_slots(text_CT), self.embed.image_slots(prime_CP)], 1)
        caches = []
        for layer in self.layers:
            x_CLD, cache = layer.prefill(x_CLD)
            caches.append(cache)
        next_slot_1 = torch.tensor([prime_CP.shape[1] + 1], device=x_CLD.device)
        return self.heads(x_CLD[:, -1], "image"), DecodingCache(caches, next_slot_1)

    def decode(self, token_B: Tensor, cache: DecodingCache) -> Tensor:
        """Read the next image token -> logits (B, V) of the one after it. The cache moves on by one slot."""
        x_B1D = self.embed.image_slot(token_B, cache.slot_1)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_B1D = layer.decode(x_B1D, layer_cache, cache.slot_1)
        cache.slot_1 += 1
        return self.heads(x_B1D[:, -1], "image")


@torch.no_grad()
def initialise(
    prior: Prior,
    generator: torch.Generator | None = None,
    gathered: Callable[[nn.Parameter], AbstractContextManager] = nullcontext,
    is_writer: bool = True,
) -> None:
    """Set every parameter of the model, in the order of `named_parameters` (the paper does not state its initialisation).

    The same state of the generator gives the same weights on any device and in any format but for rounding: numbers are drawn
    in fp32 where the generator is (None: torch's own on the CPU).

    `gathered(parameter)` is a context in which the whole parameter is there: a sharded model is initialised one parameter
    at a time, with the values that a plain one gets from the same generator. Processes that get what another one wrote when
    the context ends are no `is_writer`: they draw nothing.

    | parameter                        | value                                                            |
    |----------------------------------|------------------------------------------------------------------|
    | gains of norms                   | 1                                                                |
    | biases                           | 0                                                                |
    | embeddings, positions, pads      | Normal(0, 0.02)                                                  |
    | matrices                         | Normal(0, 1 / sqrt(fan in)), so a normed input keeps unit scale  |
    | last matrix of a residual branch | the same, divided by sqrt(2 * n_layers): the sum of the branches |
    |                                  | then has unit scale whatever the depth (Child et al. 2019)       |
    | unembeddings                     | Normal(0, 0.02): first losses near ln V                          |
    """
    for name, parameter in prior.named_parameters():
        with gathered(parameter):
            if not is_writer:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.startswith(("embed.", "heads.")):
                _draw(parameter, 0.02, generator)
            else:
                std = parameter.shape[1] ** -0.5
                if name.endswith("project.weight"):
                    std /= (2 * prior.config.n_layers) ** 0.5
                _draw(parameter, std, generator)


_DRAWN_AT_ONCE = 1 << 20
"""A multiple of 16, the numbers that torch transforms together: then pieces are the numbers of one call for all. So few stay in
the caches; memory that is new to the process for each parameter takes as long as the drawing."""


def _draw(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Normal(0, std) into a contiguous parameter on any device; torch draws only on the device of the generator."""
    if parameter.is_meta:
        return
    flat, device = parameter.view(-1), generator.device if generator is not None else "cpu"
    drawn = torch.empty(min(len(flat), 2 * _DRAWN_AT_ONCE), device=device)
    start, size = 0, _DRAWN_AT_ONCE
    while start < len(flat):
        if len(flat) - start < 2 * size:
            size = len(flat) - start  # the rest at once: torch draws fewer than 16 in another way
        flat[start : start + size].copy_(drawn[:size].normal_(0.0, std, generator=generator))
        start += size
