"""CLIP from a `transformers` folder or the hub. It maps images and captions to unit vectors that can be compared.

B images or captions, H and W pixels, C channels, D features.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_ds.errors import ConfigError, DataError, UserError
from dalle_ds.lazy import large_imports
from dalle_ds.ops.exactness import exact_fp32
from dalle_ds.places import expand_home
from dalle_ds.storage.fingerprint import fingerprint

AnyImage = Image.Image | np.ndarray
HUB = re.compile(r"hf://[\w.-]+/[\w.-]+")


class Clip:
    """A CLIP in fp32 with its tokenizer and image preprocessing. `Clip.load` opens one.

    `fingerprint` covers everything that affects a score: weights, shapes of the towers, tokenizer, preprocessing.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self._tokenizer, self._processor = model, tokenizer, processor
        self.image_size = int(model.config.vision_config.image_size)
        self.n_features = int(model.config.projection_dim)
        self.fingerprint = self._fingerprint()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Clip":
        """Open a folder written by `save_pretrained` (CLIPModel, tokenizer, image processor), or download hf://OWNER/MODEL.

        Raises:
            ConfigError: `transformers` is not installed.
            DataError: `path` does not exist, is not a CLIP, or parts of it are missing or do not match.
        """
        source = find_clip(path)
        try:
            with large_imports():
                from transformers import CLIPModel, CLIPTokenizer, PretrainedConfig

                # the other one needs torchvision
                from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        except ImportError as error:
            raise ConfigError(f"CLIP {path}: {error}; pip install 'dalle-ds[clip]'") from None
        try:
            # AutoConfig would offer to run Python code that the folder names
            kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
            if kind != "clip":
                raise DataError(f"CLIP {path}: its config.json has model_type {kind!r}, expected 'clip'")
            model, found = CLIPModel.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            tokenizer = CLIPTokenizer.from_pretrained(source)
            processor = CLIPImageProcessorPil.from_pretrained(source)
            fits = processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt")["pixel_values"].shape[1] == 3
            _check_parts(path, model, tokenizer, processor)
        except UserError:
            raise
        except Exception as error:  # of a damaged folder, transformers raises any kind of exception
            said = (str(error).splitlines() or [""])[0]
            raise DataError(f"CLIP {path}: not a CLIP that can be loaded ({type(error).__name__}: {said[:300]})") from None
        if not fits:
            raise DataError(f"CLIP {path}: its preprocessing does not make RGB images")
        if found["missing_keys"]:  # transformers only warns, and initializes them at random
            raise DataError(f"CLIP {path}: its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
        broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
        if broken:
            raise DataError(f"CLIP {path}: its weights have NaN or Inf in {', '.join(broken[:3])}")
        # Out of the mapped file: at its odd addresses, products round differently from those of another rank's copy.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        exact_fp32()
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, processor)

    def to(self, device: str | torch.device) -> "Clip":
        """Move the model. Returns self."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def image_features(self, images_BHWC: np.ndarray | Sequence[AnyImage]) -> Tensor:
        """Image features: (B, D) unit vectors, fp32, on the model's device.

        Args:
            images_BHWC: RGB images, uint8 (B, H, W, 3), or a sequence of images of any sizes.

        Raises:
            ValueError: an array that is not uint8 (H, W, 3).
        """
        for image in images_BHWC:
            if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
                raise ValueError(f"image {image.dtype} {image.shape}: expected uint8 (H, W, 3)")
        images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images_BHWC]
        pixels_BCHW = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self.model.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels_BCHW).pooler_output, dim=-1)

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Caption features: (B, D) unit vectors, fp32, on the model's device. Captions that are too long are truncated."""
        length = self.model.config.text_config.max_position_embeddings
        # pad to the full length: the features of a caption must not depend on the lengths of the others in the batch
        tokens = self._tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output, dim=-1)

    def _fingerprint(self) -> str:
        towers = (self.model.config.vision_config, self.model.config.text_config)
        about = {
            "towers": [[tower.num_attention_heads, tower.hidden_act, tower.layer_norm_eps] for tower in towers],
            "size": dict(self._processor.size),
            "crop": dict(self._processor.crop_size),
            "resample": int(self._processor.resample),
            "mean": list(self._processor.image_mean),
            "std": list(self._processor.image_std),
            "tokenizer": hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        }
        return fingerprint(about, self.model.state_dict(), with_dtypes=False)  # always fp32, see `load`


def find_clip(name: str | Path) -> str:
    """The folder or repository that a name stands for: a folder, or hf://OWNER/MODEL for a model on the Hugging Face hub.

    A name without hf:// is never looked for on the hub: a mistyped folder would fetch what a stranger has put there.

    Raises:
        DataError: there is no such folder.
    """
    text = expand_home(str(name))
    if HUB.fullmatch(text):
        return text.removeprefix("hf://")
    if not Path(text).is_dir():
        hub = f"hf://{text}" if HUB.fullmatch(f"hf://{text}") else "hf://OWNER/MODEL"
        raise DataError(f"CLIP {text}: no such folder; expected a folder, or {hub} for a model on the Hugging Face hub")
    return text


def _check_parts(path: str | Path, model: Any, tokenizer: Any, processor: Any) -> None:
    size, crop = model.config.vision_config.image_size, dict(processor.crop_size)
    if crop != {"height": size, "width": size}:
        raise DataError(f"CLIP {path}: its preprocessing makes images of {crop}, but the model expects {size} pixels per side")
    vocab = model.config.text_config.vocab_size
    if len(tokenizer) > vocab:
        raise DataError(f"CLIP {path}: its tokenizer has {len(tokenizer)} tokens, expected at most the model's {vocab}")
