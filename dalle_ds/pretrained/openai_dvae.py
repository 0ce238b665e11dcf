"""Convert OpenAI's released dVAE from its two pickled modules to this project's weights file.

The files contain whole modules. They are unpickled with torch's weights-only loader and placeholder classes: no code in the
files is executed, and OpenAI's package is not needed. Sizes are derived from the shapes of the weights.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_ds.errors import ConfigError, DataError
from dalle_ds.models.dvae import DVAE, DVAEConfig
from dalle_ds.storage import objects
from dalle_ds.storage.weights import write_weights


class _Module:
    """Placeholder for every class in a released file. It only holds the attributes of the instance."""

    _parameters: Mapping[str, Tensor]
    _modules: Mapping[str, "_Module"]


CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


def import_openai(encoder: str, decoder: str, out: str, image_size: int = 256) -> dict[str, Any]:
    """Convert OpenAI's `encoder.pkl` and `decoder.pkl` to the weights file `out`. Returns the sizes and the fingerprint.

    Args:
        encoder: pickled module or state dict of the encoder; a path, file:// or s3:// url.
        decoder: pickled module or state dict of the decoder, likewise.
        out: weights file to write.
        image_size: side in pixels of the images that the dVAE will encode. The released model was trained on 256.

    Raises:
        DataError: a file is missing, has other content, or the two do not belong together.
    """
    state = {f"encoder.{name}": tensor for name, tensor in _read(encoder).items()}
    state |= {f"decoder.{name}": tensor for name, tensor in _read(decoder).items()}
    try:
        config = _config(state, image_size)
        with torch.device("meta"):
            DVAE(config).load_state_dict(state, strict=True, assign=True)
    except (KeyError, RuntimeError, ConfigError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"{encoder} and {decoder} are not the encoder and decoder of a released dVAE: {error}") from None
    fingerprint = write_weights(out, kind="dvae", config=config.model_dump(), state=state, extra={"source": "OpenAI"})
    n_parameters = sum(tensor.numel() for tensor in state.values())
    return {"out": out, "fingerprint": fingerprint, "n_parameters": n_parameters, **config.model_dump()}


def _read(url: str) -> dict[str, Tensor]:
    """Read the parameters of a file, by name, as fp32."""
    stand_ins = [(type(name.rsplit(".", 1)[1], (_Module,), {}), name) for name in CLASSES]
    try:
        with objects.local_copy(url) as file, torch.serialization.safe_globals(stand_ins):
            if not zipfile.is_zipfile(file):  # the old format includes source code of the classes, which the loader rejects
                raise DataError(f"{url} is not in the file format of torch 1.6 or later: save it again with a newer torch")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file") from None
    except DataError:
        raise
    except Exception as error:  # a crafted pickle can raise anything, such as TypeError or RecursionError
        said = str(error)[:2000]  # a crafted name in it may have any length
        found = re.search(r"[^:\n]*\bunsupported\b.*", said, re.IGNORECASE)
        reason = found[0] if found else said.partition("\n")[0]
        raise DataError(f"{url} cannot be read as OpenAI's encoder or decoder: {reason}") from None
    try:
        named = content.items() if isinstance(content, Mapping) else _parameters(content)
        state = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    except (AttributeError, TypeError, RecursionError) as error:  # modules that contain themselves, or that are none
        raise DataError(f"{url} does not contain the modules of an encoder or decoder ({error!r})") from None
    if not state:
        raise DataError(f"{url} contains a {type(content).__name__} without weights, expected a pickled encoder or decoder")
    return {name: value.detach().float().contiguous() for name, value in state.items()}


def _parameters(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    yield from ((prefix + name, value) for name, value in getattr(module, "_parameters", {}).items())
    for name, child in getattr(module, "_modules", {}).items():
        yield from _parameters(child, f"{prefix}{name}.")


def _config(state: Mapping[str, Tensor], image_size: int) -> DVAEConfig:
    def highest(pattern: str) -> int:
        return max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=0)

    n_hid, in_channels = state["encoder.blocks.input.w"].shape[:2]
    n_init, n_codes = state["decoder.blocks.input.w"].shape[:2]
    return DVAEConfig(
        image_size=image_size,
        n_groups=highest(r"encoder\.blocks\.group_(\d+)\."),
        n_blk_per_group=highest(r"encoder\.blocks\.group_1\.block_(\d+)\."),
        n_hid=n_hid,
        n_init=n_init,
        n_codes=n_codes,
        in_channels=in_channels,
    )
