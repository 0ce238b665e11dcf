"""Train a tokenizer of CLIP's type on captions."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

START, END = "<|startoftext|>", "<|endoftext|>"


class Vocabulary(NamedTuple):
    """What a tokenizer learned. Lists of texts, for checkpoints."""

    tokens: list[str]
    merges: list[tuple[str, str]]


def learn_vocabulary(captions: Sequence[str], vocab_size: int) -> Vocabulary:
    """Train byte-level BPE of at most `vocab_size` tokens (512 of them bytes)."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    # each byte has a token for inside a word and one for the end of a word. All 512 are needed: CLIPTokenizer maps an unknown
    # byte to the end token, where CLIP's text encoder stops
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    untrained = clip_tokenizer(Vocabulary([*alphabet, START, END], []), None)
    trained = untrained.train_new_from_iterator([captions], vocab_size, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]]
    # the trainer omits bytes that never end a word and uses their tokens for more merges: drop the last merges to make room
    merges = merges[: vocab_size - len(alphabet) - 2]
    return Vocabulary([*alphabet, START, END, *dict.fromkeys("".join(pair) for pair in merges)], merges)


def clip_tokenizer(vocabulary: Vocabulary, text_len: int | None) -> Any:
    """A `transformers.CLIPTokenizer` of texts of at most `text_len` tokens."""
    from transformers import CLIPTokenizer

    numbered = {token: number for number, token in enumerate(vocabulary.tokens)}
    return CLIPTokenizer(vocab=numbered, merges=list(vocabulary.merges), model_max_length=text_len)
