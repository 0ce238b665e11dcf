"""A small CLIP folder for tests, written by `transformers`: random weights and a generated BPE vocabulary."""

import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

START, END = "<|startoftext|>", "<|endoftext|>"


def make_clip(
    folder: Path, *, image_size: int = 32, width: int = 32, n_features: int = 16, text_len: int = 32, seed: int = 0
) -> Path:
    """Write config, weights, tokenizer and preprocessing of a two-layer CLIP to `folder`. The tokenizer splits captions into
    letters, except for two merged pairs."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    merges = [("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=text_len)
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokens.index(START), "eos_token_id": tokens.index(END), "pad_token_id": tokens.index(END)}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokens), "max_position_embeddings": text_len, **marks},
        vision_config={**tower, "image_size": image_size, "patch_size": image_size // 4},
        projection_dim=n_features,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        with torch.no_grad():  # larger weights than the initial ones, which give almost constant features
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "position" not in name:
                    weight.normal_(std=0.5 if "embedding" in name else 1.5 * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(folder)
    return folder
