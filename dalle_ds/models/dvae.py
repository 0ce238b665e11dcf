"""The discrete VAE: pictures to a grid of codes, as released by the authors, for all sizes."""

# B batch, C channels, H and W pixels, K codes, h and w grid cells, N = h*w

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from dalle_ds.ops.convolution import conv2d
from dalle_ds.ops.logit_laplace import location_pixels, map_pixels, split_output
from dalle_ds.ops.relaxation import gumbel_softmax
from dalle_ds.recipes import Config


class DVAEConfig(Config):
    """Defaults are the paper's: 256 px, 32x32 cells, 8192 codes; 53,786,240 + 43,829,766 parameters."""

    image_size: int = 256
    n_groups: int = 4  # a pool follows every group but the last: each cell is 2 ** (n_groups - 1) pixels wide
    n_blk_per_group: int = 2
    n_hid: int = 256
    n_init: int = 128  # width of a code's vector in the decoder
    vocab_size: int = 8192
    in_channels: int = 3
    pixel_eps: float = 0.1

    @property
    def grid(self) -> int:
        """Cells along one side."""
        return self.image_size >> (self.n_groups - 1)

    @property
    def n_tokens(self) -> int:
        """Codes of one picture."""
        return self.grid**2

    @property
    def n_layers(self) -> int:
        """Residual blocks of the encoder, and of the decoder."""
        return self.n_groups * self.n_blk_per_group

    @model_validator(mode="after")
    def _check(self) -> "DVAEConfig":
        for name in ("image_size", "n_groups", "n_blk_per_group", "n_hid", "n_init", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}, expected at least 2 codes")
        cell = 2 ** (self.n_groups - 1)
        if self.image_size % cell:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the cell width {cell}")
        if self.n_hid % 4:
            raise ValueError(f"n_hid {self.n_hid} is not a multiple of 4: a block is a quarter as wide inside as outside")
        if not 0.0 < self.pixel_eps < 0.5:
            raise ValueError(f"pixel_eps is {self.pixel_eps}, expected between 0 and 0.5")
        return self


class Conv2d(nn.Module):
    """Same-size convolution with the released initialisation: weight ~ N(0, 1/(n_in k^2)), bias 0.

    `force_fp32` keeps the two 1x1 convolutions beside the relaxation out of autocast; the others follow the caller's autocast.
    """

    def __init__(self, n_in: int, n_out: int, k: int, force_fp32: bool = False) -> None:
        super().__init__()
        self.padding, self.force_fp32 = (k - 1) // 2, force_fp32
        w = torch.empty(n_out, n_in, k, k)
        if not w.is_meta:  # where arithmetic takes torch a second, to import its compiler
            w = torch.randn(w.shape) / math.sqrt(n_in * k * k)
        self.w = nn.Parameter(w)
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.force_fp32:
            with torch.autocast(x_BCHW.device.type, enabled=False):
                return conv2d(x_BCHW.float(), self.w, self.b, self.padding)
        return conv2d(x_BCHW, self.w, self.b, self.padding)


class ResBlock(nn.Module):
    """id_path(x) + res_path(x) / n_layers^2, pre-activation, no normalisation: the small gain keeps deep stacks stable."""

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


class Encoder(nn.Module):
    """Mapped pixels (B, C, H, W) -> logits (B, K, h, w) in fp32."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(config.in_channels, config.n_hid, 7))
        n_in = config.n_hid
        for g in range(config.n_groups):
            n_out = config.n_hid * 2**g
            # Max-pool gave the authors a better bound than average-pool.
            resize = {"pool": nn.MaxPool2d(2)} if g < config.n_groups - 1 else {}
            self.blocks.add_module(f"group_{g + 1}", _group(n_in, n_out, config, (3, 3, 3, 1), resize))
            n_in = n_out
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, config.vocab_size, 1, force_fp32=True))
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.blocks(pixels_BCHW)


class Decoder(nn.Module):
    """Codes, relaxed or one-hot (B, K, h, w) -> 2C maps (B, 2C, H, W): mu, then ln b. The first convolution is the codebook."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(config.vocab_size, config.n_init, 1, force_fp32=True))
        n_in = config.n_init
        for g in range(config.n_groups):
            n_out = config.n_hid * 2 ** (config.n_groups - 1 - g)
            resize = {"upsample": nn.Upsample(scale_factor=2, mode="nearest")} if g < config.n_groups - 1 else {}
            self.blocks.add_module(f"group_{g + 1}", _group(n_in, n_out, config, (1, 3, 3, 3), resize))
            n_in = n_out
        output = OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, 2 * config.in_channels, 1))
        self.blocks.add_module("output", nn.Sequential(output))

    def forward(self, codes_BKhw: Tensor) -> Tensor:
        return self.blocks(codes_BKhw)

    def from_codes(self, codes_Bhw: Tensor) -> Tensor:
        """The same as forward on one-hot codes, without building them: the first convolution is a look-up."""
        first = self.blocks.input
        vectors_BhwI = F.embedding(codes_Bhw, first.w.flatten(1).t().contiguous()) + first.b
        return self.blocks[1:](vectors_BhwI.permute(0, 3, 1, 2).contiguous())


class DVAE(nn.Module):
    """Encoder and decoder. A released state dict loads by putting `encoder.` or `decoder.` before each of its names."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def map_images(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pictures -> mapped pixels; refuses pictures of another size, which would give another grid in silence."""
        size, channels = self.config.image_size, self.config.in_channels
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != (channels, size, size):
            raise ValueError(f"pictures have shape {tuple(images_BCHW.shape)}, expected (batch, {channels}, {size}, {size})")
        if images_BCHW.dtype != torch.uint8:
            raise ValueError(f"pictures are {images_BCHW.dtype}, expected uint8 in 0..255 (mapping is done here, once)")
        return map_pixels(images_BCHW, self.config.pixel_eps)

    def encode_logits(self, pixels_BCHW: Tensor) -> Tensor:
        """Mapped pixels -> logits (B, K, h, w), fp32."""
        return self.encoder(pixels_BCHW)

    @torch.no_grad()
    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pictures -> codes (B, N) int64 in raster order: the argmax, without noise (paper, section 2.2)."""
        return self.encode_logits(self.map_images(images_BCHW)).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode_tokens(self, codes_BN: Tensor) -> Tensor:
        """Codes (B, N) -> uint8 pictures (B, C, H, W)."""
        config = self.config
        if codes_BN.ndim != 2 or codes_BN.shape[1] != config.n_tokens:
            raise ValueError(f"codes have shape {tuple(codes_BN.shape)}, expected (batch, {config.n_tokens})")
        if codes_BN.numel():
            low, high = int(codes_BN.min()), int(codes_BN.max())
            if low < 0 or high >= config.vocab_size:
                raise ValueError(f"codes run from {low} to {high}, expected 0..{config.vocab_size - 1}")
        mu, _ = split_output(self.decoder.from_codes(codes_BN.unflatten(1, (config.grid, config.grid))))
        return location_pixels(mu, config.pixel_eps)

    def forward(
        self, images_BCHW: Tensor, tau: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One relaxed pass for training -> (mapped pixels, logits, mu, ln b), all fp32."""
        pixels_BCHW = self.map_images(images_BCHW)
        logits_BKhw = self.encode_logits(pixels_BCHW)
        mu, ln_b = split_output(self.decoder(gumbel_softmax(logits_BKhw, tau, generator)))
        return pixels_BCHW, logits_BKhw, mu, ln_b
