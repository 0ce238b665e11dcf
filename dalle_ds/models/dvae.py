"""The discrete VAE: maps images to a grid of codes. The architecture is the one that the authors released, at any size."""

# B batch, C channels, H and W pixels, K codes, h and w grid cells, N = h*w

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle_ds.ops.convolution import conv2d
from dalle_ds.ops.logit_laplace import location_pixels, map_pixels, split_output
from dalle_ds.ops.relaxation import gumbel_softmax
from dalle_ds.recipes import Config


class DVAEConfig(Config):
    """Size of the dVAE. Defaults are the paper's: 256 px, a 32x32 grid, 8192
    codes; the encoder has 53,786,240 parameters, the decoder 43,829,766.

    The upper limits are far above any model, as those of `PriorConfig`.
    """

    image_size: int = Field(256, le=2**14, description="width and height in pixels")
    n_groups: int = Field(
        4,
        le=12,
        description="groups of residual blocks; all but the last end in a pool: a cell is patch * 2^(n_groups - 1) pixels wide",
    )
    patch: int = Field(
        1,
        le=2**10,
        description="squares of patch x patch pixels are folded into channels before the first convolution, and unfolded after "
        "the last; 1: none, as in the paper. 2 takes about half of the time per update and suits small images",
    )
    encoder: Literal["convolutional", "cellwise"] = Field(
        "convolutional",
        description="convolutional: a code depends on its cell and what lies around it, as in the paper. cellwise: on the "
        "pixels of its cell alone, so that equal cells have equal codes; small priors learn these much sooner",
    )
    n_blk_per_group: int = Field(2, le=2**8, description="residual blocks per group")
    n_hid: int = Field(256, le=2**14, description="channels of the first group of the encoder and of the last of the decoder")
    n_init: int = Field(128, le=2**14, description="width of a code's embedding vector in the decoder")
    n_codes: int = Field(8192, le=2**20, description="codes of the codebook")
    in_channels: int = Field(3, le=2**8, description="channels of an image; 3: RGB")
    pixel_eps: float = Field(
        0.1, description="pixels are mapped to pixel_eps ... 1 - pixel_eps before the logit-Laplace density"
    )

    @property
    def grid(self) -> int:
        """Grid cells along one side."""
        return self.image_size // self.cell

    @property
    def cell(self) -> int:
        """Pixels along one side of a grid cell."""
        return self.patch << (self.n_groups - 1)

    @property
    def n_tokens(self) -> int:
        """Number of codes per image."""
        return self.grid**2

    @property
    def n_features(self) -> int:
        """Features of a cell, from which the encoder's last convolution makes logits."""
        return self.n_hid << (self.n_groups - 1)

    @property
    def n_layers(self) -> int:
        """Number of residual blocks in the encoder; the decoder has as many."""
        return self.n_groups * self.n_blk_per_group

    @model_validator(mode="after")
    def _check(self) -> "DVAEConfig":
        for name in ("image_size", "n_groups", "n_blk_per_group", "patch", "n_hid", "n_init", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n_codes < 2:
            raise ValueError(f"n_codes is {self.n_codes}, expected at least 2 codes")
        if self.image_size % self.cell:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the cell width {self.cell}")
        if self.n_hid % 4:
            raise ValueError(f"n_hid {self.n_hid} is not a multiple of 4: the hidden width of a residual block is n_hid / 4")
        if not 0.0 < self.pixel_eps < 0.5:
            raise ValueError(f"pixel_eps is {self.pixel_eps}, expected between 0 and 0.5")
        return self


class Conv2d(nn.Module):
    """Convolution with "same" padding and the released initialisation: weight ~ N(0, 1/(n_in k^2)), bias 0.

    `force_fp32` disables autocast. It is set for the two 1x1 convolutions next to the relaxation; all other convolutions
    follow the caller's autocast.
    """

    def __init__(self, n_in: int, n_out: int, k: int, force_fp32: bool = False) -> None:
        super().__init__()
        self.padding, self.force_fp32 = (k - 1) // 2, force_fp32
        w = torch.empty(n_out, n_in, k, k)
        if not w.is_meta:  # arithmetic on meta tensors makes torch import its compiler, which takes a second
            w = torch.randn(w.shape) / math.sqrt(n_in * k * k)
        self.w = nn.Parameter(w)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.force_fp32:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return conv2d(x_BCHW.float(), self.w, self.b, self.padding)
        return conv2d(x_BCHW, self.w, self.b, self.padding)


class ResBlock(nn.Module):
    """id_path(x) + res_path(x) / n_layers^2, pre-activation, without normalisation. The small gain keeps deep stacks stable."""

    def __init__(self, n_in: int, n_out: int, n_layers: int, kernels: tuple[int, int, int, int]) -> None:
        super().__init__()
        n_hid = n_out // 4
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        self.post_gain = 1.0 / n_layers**2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        for i, k in enumerate(kernels, start=1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", Conv2d(widths[i - 1], widths[i], k))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.add(self.id_path(x_BCHW), self.res_path(x_BCHW), alpha=self.post_gain)


def _group(
    n_in: int, n_out: int, config: DVAEConfig, kernels: tuple[int, int, int, int], resize: dict[str, nn.Module]
) -> nn.Sequential:
    group = nn.Sequential()
    for i in range(config.n_blk_per_group):
        group.add_module(f"block_{i + 1}", ResBlock(n_in if i == 0 else n_out, n_out, config.n_layers, kernels))
    for name, module in resize.items():
        group.add_module(name, module)
    return group


def _fold(x_BCHW: Tensor, patch: int) -> Tensor:
    return x_BCHW if patch == 1 else F.pixel_unshuffle(x_BCHW, patch)


def _unfold(x_BCHW: Tensor, patch: int) -> Tensor:
    return x_BCHW if patch == 1 else F.pixel_shuffle(x_BCHW, patch)


class Encoder(nn.Module):
    """Mapped pixels (B, C, H, W) -> fp32 logits (B, K, h, w)."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        if config.encoder == "cellwise":
            self.patch = config.cell
            self._add_cellwise(config)
        else:
            self.patch = config.patch
            self._add_convolutional(config)
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(config.n_features, config.n_codes, 1, force_fp32=True))
        self.blocks.add_module("output", nn.Sequential(output))

    def _add_convolutional(self, config: DVAEConfig) -> None:
        self.blocks.add_module("input", Conv2d(config.in_channels * self.patch**2, config.n_hid, 7))
        n_in = config.n_hid
        for g in range(config.n_groups):
            n_out = config.n_hid * 2**g
            # Max-pool gave the authors a better bound than average-pool.
            resize = {"pool": nn.MaxPool2d(2)} if g < config.n_groups - 1 else {}
            self.blocks.add_module(f"group_{g + 1}", _group(n_in, n_out, config, (3, 3, 3, 1), resize))
            n_in = n_out

    def _add_cellwise(self, config: DVAEConfig) -> None:
        width = config.n_features
        self.blocks.add_module("input", Conv2d(config.in_channels * self.patch**2, width, 1))
        for g in range(config.n_groups):
            self.blocks.add_module(f"group_{g + 1}", _group(width, width, config, (1, 1, 1, 1), {}))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.blocks(_fold(pixels_BCHW, self.patch))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """What the last convolution turns into logits: mapped pixels (B, C, H, W) -> (B, n_features, h, w)."""
        return self.blocks.output.relu(self.blocks[:-1](_fold(pixels_BCHW, self.patch)))


class Decoder(nn.Module):
    """Relaxed or one-hot codes (B, K, h, w) -> 2C maps (B, 2C, H, W): first mu, then ln b.

    The weight of the first convolution is the codebook.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(config.n_codes, config.n_init, 1, force_fp32=True))
        n_in = config.n_init
        for g in range(config.n_groups):
            n_out = config.n_hid * 2 ** (config.n_groups - 1 - g)
            resize = {"upsample": nn.Upsample(scale_factor=2, mode="nearest")} if g < config.n_groups - 1 else {}
            self.blocks.add_module(f"group_{g + 1}", _group(n_in, n_out, config, (1, 3, 3, 3), resize))
            n_in = n_out
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, 2 * config.in_channels * config.patch**2, 1))
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, codes_BKhw: Tensor) -> Tensor:
        return self.from_vectors(self.blocks.input(codes_BKhw))

    def from_codes(self, codes_Bhw: Tensor) -> Tensor:
        """Decode code indices (B, h, w). Equal to `forward` on one-hot
        codes, but the first convolution is an embedding look-up."""
        first = self.blocks.input
        vectors_BhwI = F.embedding(codes_Bhw, first.w.flatten(1).t().contiguous()) + first.b
        return self.from_vectors(vectors_BhwI.permute(0, 3, 1, 2).contiguous())

    def from_vectors(self, vectors_BIhw: Tensor) -> Tensor:
        """Decode what the first convolution made of codes: (B, n_init, h, w) -> (B, 2C, H, W)."""
        return _unfold(self.blocks[1:](vectors_BIhw), self.patch)


class DVAE(nn.Module):
    """Encoder and decoder. To load a released state dict, prefix each of its names with `encoder.` or `decoder.`."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def map_images(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> mapped pixels.

        Raises:
            ValueError: the images are not uint8 of the configured size. Other sizes would silently give another grid.
        """
        size, channels = self.config.image_size, self.config.in_channels
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != (channels, size, size):
            raise ValueError(f"images have shape {tuple(images_BCHW.shape)}, expected (batch, {channels}, {size}, {size})")
        if images_BCHW.dtype != torch.uint8:
            raise ValueError(f"images are {images_BCHW.dtype}, expected uint8 in 0..255 (map_images maps them itself)")
        return map_pixels(images_BCHW, self.config.pixel_eps)

    def encode_logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Mapped pixels (B, C, H, W) -> fp32 logits (B, K, h, w)."""
        return self.encoder(pixels_BCHW)

    @torch.no_grad()
    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> codes (B, N) int64 in raster order.

        Codes are the argmax of the logits, without noise (paper, section 2.2).
        """
        return self.encode_logits(self.map_images(images_BCHW)).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode_tokens(self, codes_BN: Tensor) -> Tensor:
        """Codes (B, N) -> uint8 images (B, C, H, W).

        Raises:
            ValueError: the codes have the wrong shape or are outside 0..n_codes - 1.
        """
        config = self.config
        if codes_BN.ndim != 2 or codes_BN.shape[1] != config.n_tokens:
            raise ValueError(f"codes have shape {tuple(codes_BN.shape)}, expected (batch, {config.n_tokens})")
        if codes_BN.numel():
            low, high = int(codes_BN.min()), int(codes_BN.max())
            if low < 0 or high >= config.n_codes:
                raise ValueError(f"codes run from {low} to {high}, expected 0..{config.n_codes - 1}")
        mu, _ = split_output(self.decoder.from_codes(codes_BN.unflatten(1, (config.grid, config.grid))))
        return location_pixels(mu, config.pixel_eps)

    def forward(
        self, images_BCHW: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training pass through the relaxed codes. Returns (mapped pixels, logits, mu, ln b), all fp32."""
        pixels_BCHW = self.map_images(images_BCHW)
        logits_BKhw = self.encode_logits(pixels_BCHW)
        mu, ln_b = split_output(self.decoder(gumbel_softmax(logits_BKhw, tau, generator)))
        return pixels_BCHW, logits_BKhw, mu, ln_b
