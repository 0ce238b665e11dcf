"""Train a tokenizer of CLIP's type on captions."""

import json
from collections.abc import Sequence
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"


def train_clip_tokenizer(captions: Sequence[str], vocab_size: int, text_len: int) -> Any:
    """Train byte-level BPE. Returns a `transformers.CLIPTokenizer` of at most `vocab_size` tokens (512 of them bytes)."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    # each byte has a token for inside a word and one for the end of a word. All 512 are needed: CLIPTokenizer maps an unknown
    # byte to the end token, where CLIP's text encoder stops
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    untrained = CLIPTokenizer(vocab=_numbered([*alphabet, START, END]), merges=[], model_max_length=text_len)
    trained = untrained.train_new_from_iterator([captions], vocab_size, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    # the trainer omits bytes that never end a word and uses their tokens for more merges: drop the last merges to make room
    merges = merges[: vocab_size - len(alphabet) - 2]
    tokens = [*alphabet, START, END, *dict.fromkeys("".join(pair) for pair in merges)]
    return CLIPTokenizer(vocab=_numbered(tokens), merges=merges, model_max_length=text_len)


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
