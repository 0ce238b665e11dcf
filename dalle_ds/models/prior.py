"""The prior: a decoder-only sparse transformer over text and image tokens (paper section 2.2, appendix B).

The T text slots are start-of-text, up to T-1 text tokens, then pads. The N image slots are start-of-image, then the first N-1
image tokens. Slot i < T-1 predicts text token i; slot T+j predicts image token j. The paper does not say whether its two start
tokens count within 256 + 1024. Here they do, so the sequence is exactly 1280 = 40 blocks of 32, the block size of its kernels.

B batch, T text slots, N image tokens, L = T + N slots, D model width, V vocabulary, C captions, P prompt tokens of an image.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle_ds.models.attention import LayerCache, SelfAttention
from dalle_ds.models.resblock import MLP, InputsFirstLinear, Linear, ResBlock
from dalle_ds.ops.attention.masks import Pattern, SparseMask, layer_patterns
from dalle_ds.ops.cross_entropy import linear_cross_entropy, linear_nll
from dalle_ds.padding import PAD
from dalle_ds.recipes import Config

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8
"""Weights of the mean text loss and the mean image loss in the training loss (paper section 2.2)."""


class PriorConfig(Config):
    """Size of the prior. The defaults are the paper's 12-billion-parameter model.

    The upper limits are far above any model: a config may come with the weights of a stranger, and is built before it is
    compared with them.
    """

    n_layers: int = Field(64, ge=1, le=1024)
    n_heads: int = Field(62, ge=1, le=1024)
    d_head: int = Field(64, ge=1, le=1024)
    text_len: int = Field(256, ge=2, le=2**16, description="text slots, including start-of-text")
    grid: int = Field(32, ge=1, le=1024, description="image tokens along one side")
    vocab_size: int = Field(16384, ge=1, le=2**24)
    n_codes: int = Field(8192, ge=2, le=2**16)
    conv_kernel: int = Field(11, ge=1, le=2**11, description="side of the last layer's attention window; odd")
    embedding_std: float = Field(
        0.02,
        gt=0,
        description="standard deviation of the first embeddings, positions and pads. The branches of all layers together have "
        "unit scale, beside which 0.02 is small: near 1, small models in short runs learn from half of the samples",
    )
    position_init: Literal["normal", "fourier"] = Field(
        "normal",
        description="first positions of text slots, rows and columns: unrelated normal numbers, or waves of random "
        "frequencies, where a step to the next slot is a rotation, which narrow heads learn sooner",
    )

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
        """The attention mask of the layers with this pattern."""
        return SparseMask(pattern, self.text_len, self.grid, self.conv_kernel)


class NLL(NamedTuple):
    """Summed negative log-likelihoods in nats (fp32 scalars), and the number of targets in each sum."""

    text_sum: Tensor
    n_text: Tensor
    image_sum: Tensor
    n_image: Tensor


class SlotEmbedding(nn.Module):
    """Embed text and image tokens, in fp32 (paper appendix B.1, figure 10, and D item 2)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        # Empty like the other parameters: `initialise` draws them all. nn.Embedding would draw its own values, which on the
        # meta device makes torch import its compiler.
        self.text = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, d), freeze=False)
        self.image = nn.Embedding.from_pretrained(torch.empty(config.n_codes, d), freeze=False)
        self.start_of_text = nn.Parameter(torch.empty(d))
        self.start_of_image = nn.Parameter(torch.empty(d))
        self.text_position = nn.Parameter(torch.empty(config.text_len, d))
        # One learned pad vector for each text position. Pads are ordinary keys and are not masked out: the paper found that
        # this generalises better to captions unlike the training ones. The vector of slot 0, which holds start-of-text, is not
        # used; without it, weights and checkpoints of earlier versions would not fit.
        self.pad = nn.Parameter(torch.empty(config.text_len, d))
        self.row = nn.Parameter(torch.empty(config.grid, d))
        self.column = nn.Parameter(torch.empty(config.grid, d))

    def forward(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """Embed all slots: text (B, T-1), image (B, N) -> (B, L, D). The last image token is only a target, never an input."""
        return torch.cat([self.text_slots(text_BT), self.image_slots(image_BN[:, :-1])], 1)

    def text_slots(self, text_BT: Tensor) -> Tensor:
        """Embed start-of-text, tokens and pads: text (B, T-1) int64, PAD after the last token -> (B, T, D)."""
        start = (self.start_of_text + self.text_position[0]).expand(text_BT.shape[0], 1, -1)
        tokens = self.text(text_BT.clamp(min=0)) + self.text_position[1:]
        # The pad vector replaces the sum of token and position, since it is learned per position itself.
        rest = torch.where((text_BT == PAD)[:, :, None], self.pad[1:], tokens)
        return torch.cat([start, rest], 1)

    def image_slots(self, previous_BN: Tensor) -> Tensor:
        """Embed the first image slots, which are start-of-image and n tokens: (B, n) -> (B, n + 1, D)."""
        start = self.start_of_image.expand(previous_BN.shape[0], 1, -1)
        x = torch.cat([start, self.image(previous_BN)], 1)
        return x + self._cell_positions(torch.arange(x.shape[1], device=x.device))

    def image_slot(self, previous_B: Tensor, slot_1: Tensor) -> Tensor:
        """Embed image slot `slot_1` > 0, whose input is the token of the previous cell: (B,) -> (B, 1, D)."""
        return self.image(previous_B)[:, None] + self._cell_positions(slot_1)

    def _cell_positions(self, cells_n: Tensor) -> Tensor:
        """Position embeddings (n, D): the row and column of the cell that each slot predicts."""
        return self.row[cells_n // self.config.grid] + self.column[cells_n % self.config.grid]


class Unembedding(Linear):
    """Logits or losses of one modality's tokens, in fp32 even under autocast. Targets equal to `ignore_index` are ignored.

    This module also computes the losses, for two reasons. The logits of a whole batch never exist at once. And ZeRO-3 gathers
    the parameters of a module when the module is called, so they must be used inside `forward`.
    """

    def __init__(self, d_model: int, vocab: int, ignore_index: int | None = None) -> None:
        super().__init__(d_model, vocab)
        self.ignore_index = ignore_index

    def forward(
        self, x_BLD: Tensor, targets_BL: Tensor | None = None, *, n_targets: int | None = None, per_token: bool = False
    ) -> Tensor:
        """Return logits (B, L, V), or losses in nats if targets are passed: their sum, or with `per_token` each loss (B, L).

        `n_targets` is the number of targets that are not ignored. Without it, the host must wait for the GPU to count them.
        """
        if targets_BL is None:
            with torch.autocast(x_BLD.device.type, enabled=False):
                return self.matmul(x_BLD.float(), self.weight.float(), self.bias.float())
        rows = x_BLD.flatten(0, -2), self.weight, self.bias, targets_BL.flatten(), self.ignore_index
        return linear_nll(*rows).view_as(targets_BL) if per_token else linear_cross_entropy(*rows, n_kept=n_targets)


class Heads(nn.Module):
    """Final norm and one fp32 unembedding per modality. Text slots have no logits for image tokens, nor the reverse."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.text = Unembedding(config.d_model, config.vocab_size, ignore_index=PAD)
        self.image = Unembedding(config.d_model, config.n_codes)

    def forward(self, x_BLD: Tensor, modality: str, targets_BL: Tensor | None = None, **options: Any) -> Tensor:
        """Apply the norm and the unembedding of `modality`, "text" or "image".

        Returns fp32 logits (B, L, V), or losses if targets are passed; see `Unembedding.forward`.
        """
        return self.get_submodule(modality)(self.norm(x_BLD), targets_BL, **options)


class Layer(nn.Module):
    """An attention and an MLP residual block. Each of the two has its own gradient scale."""

    def __init__(self, config: PriorConfig, attention: SelfAttention) -> None:
        super().__init__()
        self.attention = ResBlock(config.d_model, attention)
        self.mlp = ResBlock(config.d_model, MLP(config.d_model))
        self.run_blocks: Callable[[Tensor], Tensor] | None = None
        """If set, called instead of `blocks`. Activation checkpointing sets it."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return (self.run_blocks or self.blocks)(x_BLD)

    def blocks(self, x_BLD: Tensor) -> Tensor:
        """Run both residual blocks: (B, L, D) -> (B, L, D)."""
        return self.mlp(self.attention(x_BLD))

    def prefill(self, x_BLD: Tensor) -> tuple[Tensor, LayerCache]:
        """Run the first slots of a sequence. Returns their output and the cache from which `decode` continues."""
        x_BLD, h_BLD = self.attention.to_branch(x_BLD)
        y_BLD, cache = self.attention.branch.prefill(h_BLD)
        return self.mlp(self.attention.from_branch(x_BLD, y_BLD)), cache

    def decode(self, x_B1D: Tensor, cache: LayerCache, slot_1: Tensor) -> Tensor:
        """Run image slot `slot_1`, which follows the slots in the cache."""
        x_B1D, h_B1D = self.attention.to_branch(x_B1D)
        y_B1D = self.attention.branch.decode(h_B1D, cache, slot_1)
        return self.mlp(self.attention.from_branch(x_B1D, y_B1D))


@dataclass
class DecodingCache:
    """State of token-by-token decoding. Its tensors are updated in place
    and keep their shapes, so that one CUDA graph can replay every step."""

    layers: list[LayerCache]
    slot_1: Tensor
    """Index of the image slot that reads the next token, (1,) int64."""

    def expand(self, n: int) -> "DecodingCache":
        """Repeat the cache for n candidates of each caption. Nothing is computed again."""
        return DecodingCache([layer.expand(n) for layer in self.layers], self.slot_1.clone())


class Prior(nn.Module):
    """The sparse transformer as plain single-device fp32 code.

    Precision, sharding and activation checkpointing are applied from outside.
    """

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
        """Calls a layer. Replace it to wrap every layer's call."""

    def forward(self, text_BT: Tensor, image_BN: Tensor, *, n_text: int | None = None, per_token: bool = False) -> NLL | Tensor:
        """Sum the losses of both modalities over a batch.

        Text targets are real tokens only; the paper does not state whether pads were targets. Losses are sums, not means: the
        weighting of paper section 2.5 needs token counts over the global batch, which only the trainer knows.

        Args:
            text_BT: (B, T-1) int64, right-padded with PAD.
            image_BN: (B, N) int64.
            n_text: number of text tokens in this batch. Without it, the host must wait for the GPU to count them.
            per_token: return `image_nll` instead. Under ZeRO-3 only `forward` gathers parameters, other methods do not.
        """
        if per_token:
            return self.image_nll(text_BT, image_BN)
        x = self._hidden(text_BT, image_BN)
        first_image = self.config.text_len
        text_sum = self.heads(x[:, : first_image - 1], "text", text_BT, n_targets=n_text)
        image_sum = self.heads(x[:, first_image:], "image", image_BN)
        n_image = torch.full((), image_BN.numel(), device=image_BN.device)  # filled on the device: a host copy would block
        return NLL(text_sum, (text_BT != PAD).sum(), image_sum, n_image)

    def image_nll(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """Negative log-likelihood of every image token given its caption and the previous image tokens: (B, N), in nats."""
        x = self._hidden(text_BT, image_BN)[:, self.config.text_len :]
        return self.heads(x, "image", image_BN, per_token=True)

    def token_nll(self, text_BT: Tensor, image_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every token: text (B, T-1), 0 at pads, and image (B, N), in nats."""
        x = self._hidden(text_BT, image_BN)
        text = self.heads(x[:, : self.config.text_len - 1], "text", text_BT, per_token=True)
        return text, self.heads(x[:, self.config.text_len :], "image", image_BN, per_token=True)

    def image_logits(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        """fp32 logits (B, N, V) of every image token. Only tests use it, as the reference for losses and decoding."""
        return self.heads(self._hidden(text_BT, image_BN)[:, self.config.text_len :], "image")

    def _hidden(self, text_BT: Tensor, image_BN: Tensor) -> Tensor:
        x = self.embed(text_BT, image_BN)
        for layer in self.layers:
            x = self.run_layer(layer, x)
        return x

    # ---- token by token -----------------------------------------------------------------------------------------------

    def prefill(self, text_CT: Tensor, prime_CP: Tensor | None = None) -> tuple[Tensor, DecodingCache]:
        """Run captions (C, T-1), start-of-image and, for image prompts, the first P < N image tokens (C, P).

        Returns the logits (C, V) of image token P and the cache from which `decode` continues.
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
        """Run one image token (B,) and advance the cache by one slot. Returns the logits (B, V) of the token after it."""
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
    """Initialise every parameter of the model, in the order of `named_parameters`. The paper does not state its initialisation.

    The same generator state gives the same weights, up to rounding, on any device and in any number format: numbers are drawn
    in fp32 on the generator's device.

    Args:
        generator: source of the random numbers. None is torch's default generator on the CPU.
        gathered: returns a context in which the given parameter is whole. A sharded model is initialised one parameter at a
            time and gets the values that an unsharded model gets from the same generator.
        is_writer: False on ranks that receive the parameter from another rank when the context ends. They draw nothing.

    | parameter                        | value                                                            |
    |----------------------------------|------------------------------------------------------------------|
    | gains of norms                   | 1                                                                |
    | biases                           | 0                                                                |
    | embeddings, positions, pads      | Normal(0, config.embedding_std), 0.02 by default                 |
    | positions, "fourier"             | sqrt(2) * embedding_std * cos(w_d * slot + phase_d) (Rahimi and  |
    |                                  | Recht 2007): w_d of a dimension from a quarter of a cycle over   |
    |                                  | all slots to half a cycle a slot, uniform in its logarithm       |
    | matrices                         | Normal(0, 1 / sqrt(fan in)): a normed input keeps unit scale     |
    | last matrix of a residual branch | the same, divided by sqrt(2 * n_layers): the sum of the branches |
    |                                  | has unit scale at any depth (Child et al. 2019)                  |
    | unembeddings                     | Normal(0, 0.02): the first losses are near ln V                  |
    """
    inputs_first = {f"{name}.weight" for name, module in prior.named_modules() if isinstance(module, InputsFirstLinear)}
    for name, parameter in prior.named_parameters():
        with gathered(parameter):
            if not is_writer:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name in _POSITIONS and prior.config.position_init == "fourier":
                _draw_waves(parameter, prior.config.embedding_std, generator)
            elif name.startswith("embed."):
                _draw(parameter, prior.config.embedding_std, generator)
            elif name.startswith("heads."):
                _draw(parameter, 0.02, generator)
            else:
                std = parameter.shape[0 if name in inputs_first else 1] ** -0.5
                if name.endswith("project.weight"):
                    std /= (2 * prior.config.n_layers) ** 0.5
                _draw(parameter, std, generator)


_POSITIONS: Final = ("embed.text_position", "embed.row", "embed.column")


def _draw_waves(parameter_SD: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill positions (slots S, D) with random Fourier features of the slot's number, of the given standard deviation."""
    if parameter_SD.is_meta:
        return
    n_slots, d = parameter_SD.shape
    device = generator.device if generator is not None else "cpu"
    exponents_D, phases_D = torch.rand(2, d, generator=generator, device=device)
    slowest, fastest = math.pi / 2 / n_slots, math.pi  # radians a slot
    angles_SD = torch.arange(n_slots, device=device)[:, None] * (slowest * (fastest / slowest) ** exponents_D)
    parameter_SD.copy_((angles_SD + 2 * math.pi * phases_D).cos_().mul_(2**0.5 * std))


_DRAWN_AT_ONCE = 1 << 20
"""Numbers drawn per call. torch transforms 16 numbers together, so with a multiple of 16 the pieces equal one call for all.
A buffer of this size stays in the CPU caches; allocating fresh memory for each parameter would take as long as the drawing."""


def _draw(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a contiguous parameter with Normal(0, std). It may be on any device; numbers are drawn on the generator's device."""
    if parameter.is_meta:
        return
    flat, device = parameter.view(-1), generator.device if generator is not None else "cpu"
    drawn = torch.empty(min(len(flat), 2 * _DRAWN_AT_ONCE), device=device)
    start, size = 0, _DRAWN_AT_ONCE
    while start < len(flat):
        if len(flat) - start < 2 * size:
            size = len(flat) - start  # draw the rest in one call: torch draws fewer than 16 numbers in another way
        flat[start : start + size].copy_(drawn[:size].normal_(0.0, std, generator=generator))
        start += size
