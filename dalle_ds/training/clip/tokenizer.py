"""A tokenizer of CLIP's own kind, learned from captions."""

import json
from collections.abc import Sequence
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(captions: Sequence[str], vocab_size: int, text_len: int) -> Any:
    """Byte-level BPE over words, as `transformers.CLIPTokenizer`, of at most `vocab_size` tokens (512 are bytes)."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    # each as it is inside of a word and at its end. All of them: what is unknown reads as the end mark, where CLIP stops
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    untrained = CLIPTokenizer(vocab=_numbered([*alphabet, START, END]), merges=[], model_max_length=text_len)
    trained = untrained.train_new_from_iterator([captions], vocab_size, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    # the trainer leaves out letters that it has not seen at the end of a word: their places are the last merges'
    merges = merges[: vocab_size - len(alphabet) - 2]
    tokens = [*alphabet, START, END, *dict.fromkeys("".join(pair) for pair in merges)]
    return CLIPTokenizer(vocab=_numbered(tokens), merges=merges, model_max_length=text_len)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
