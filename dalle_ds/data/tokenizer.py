"""Captions to BPE tokens: a sentencepiece model that merges only inside runs of a-z.

The rule is the author's (openai/DALL-E issue 22): captions are lower-cased and split on everything that is not a-z. Digits,
punctuation (the apostrophe too) and spaces are tokens of their own, never merged with anything. Characters that the vocabulary
lacks fall back to their UTF-8 bytes; how the paper treats them is not stated. Lower-casing and whitespace are the model file's
own normalisation (nmt_nfkc_cf), so the plain .model file works in any sentencepiece.
"""

import io
import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from dalle_ds.data.bpe_dropout import DropoutEncoder
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.storage.fingerprint import fingerprint
from dalle_ds.storage.objects import read_bytes, write_bytes

log = logging.getLogger(__name__)

NORMALIZATION = "nmt_nfkc_cf"
SPLITTING_RULE = "merge a-z only"
SPACE = "\u2581"  # how sentencepiece writes a space
PLAIN = re.compile(r"[ -~]*")
"""Captions whose normal form is known without sentencepiece: printable ASCII."""
MAX_CACHED_WORDS = 1 << 17
ID_BYTES = 4  # of a packed id, int32
SEGMENT = re.compile(r"[a-z]+|.", re.DOTALL)  # runs of a-z, and every other character alone
ASCII_SINGLES = string.digits + string.punctuation + SPACE
N_BYTES_AND_UNKNOWN = 256 + 1
# The trainer's memory grows with the distinct words. Beyond a million of them the rest are typos that win no merge.
MAX_DISTINCT_WORDS = 1_000_000
MAX_WORD_LETTERS = 64  # longer runs are noise (keys, "aaaa..."); the trainer's time is quadratic in them
CHARACTER_COVERAGE = 0.9995  # sentencepiece's own default: rarer characters are left to the byte fallback


class CaptionTokenizer:
    """Encode captions by a trained model. Picklable; equal fingerprints mean equal tokens.

    Args:
        model: the .model file as a path, file:// or s3:// url, or as bytes.

    Raises:
        DataError: missing, not a sentencepiece model, or one whose pieces cross the a-z boundary.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        source = "the tokenizer given as bytes" if isinstance(model, bytes) else f"tokenizer {model}"
        try:
            self.model_bytes = model if isinstance(model, bytes) else read_bytes(model)
        except FileNotFoundError:
            raise DataError(f"{source}: no such file; the tokenizer stage writes it") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError as error:
            raise DataError(
                f"{source}: expected a sentencepiece .model file, found {len(self.model_bytes)} bytes of "
                f"something else ({error})"
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self._index_pieces(source)
        rule = {"kind": "caption tokenizer", "normalization": NORMALIZATION, "split": SPLITTING_RULE}
        self.fingerprint: str = fingerprint(rule, {"model": self.model_bytes})
        self._space = _packed([self._id_of_piece[SPACE]])
        self._dropout = DropoutEncoder(self._rank_of_piece, self._id_of_piece)
        # Nothing merges across spaces, so a word has the same tokens wherever it stands.
        self._packed_word = lru_cache(MAX_CACHED_WORDS)(self._pack_word)
        self._segments_of_word = lru_cache(MAX_CACHED_WORDS)(self._split_word)

    def _index_pieces(self, source: str) -> None:
        model = self._processor
        self._id_of_piece = {}
        self._rank_of_piece = {}
        self._id_of_byte = {}
        for i in range(self.vocab_size):
            piece = model.id_to_piece(i)
            if model.is_byte(i):
                self._id_of_byte[int(piece[3:5], 16)] = i
                continue
            if model.is_unknown(i) or model.is_control(i) or model.is_unused(i):
                continue
            if len(piece) > 1:
                if not re.fullmatch("[a-z]+", piece):
                    raise DataError(
                        f"{source}: piece {piece!r} (id {i}) merges more than a-z; expected a model of the "
                        f"splitting rule {SPLITTING_RULE!r}, as the tokenizer stage trains it"
                    )
                self._rank_of_piece[piece] = -model.get_score(i)
            self._id_of_piece[piece] = i
        if SPACE not in self._id_of_piece:
            raise DataError(f"{source}: no piece for a space, expected {SPACE!r} among its {self.vocab_size} pieces")
        if len(self._id_of_byte) != 256:
            raise DataError(f"{source}: {len(self._id_of_byte)} byte pieces, expected 256 (a model trained with byte_fallback)")

    def encode(self, caption: str) -> list[int]:
        """Token ids in [0, vocab_size), without any start or end mark; empty for a caption of spaces alone."""
        return np.frombuffer(self.pack(caption), dtype=np.int32).tolist()

    def pack(self, caption: str) -> bytes:
        """As `encode`: the ids as int32 bytes, many times as fast to make and to join into an array as a list."""
        return self._space.join(map(self._packed_word, self._words(caption)))

    def pack_with_dropout(self, caption: str, p: float, rng: np.random.Generator) -> bytes:
        """As `pack`, with each merge candidate dropped with chance p (paper: 0.1, in training); a pure function of rng."""
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"BPE dropout p is {p}, expected a chance from 0 to 1")
        if p == 0.0:
            return self.pack(caption)
        return self._space.join(self._dropout.encode(map(self._segments_of_word, self._words(caption)), p, rng))

    def _words(self, caption: str) -> list[str]:
        if PLAIN.fullmatch(caption):  # nearly every caption: `normalize` and split in one
            return caption.lower().split() or [""]
        return self.normalize(caption).split(SPACE)

    def _pack_word(self, word: str) -> bytes:
        parts = self._segments_of_word(word)
        return b"".join(part if type(part) is bytes else self._dropout.pack(part, repeat(0)) for part in parts)

    def _split_word(self, word: str) -> tuple[str | bytes, ...]:
        """The word's runs of a-z as they are, and the ids of all else."""
        parts: list[str | bytes] = []
        for segment in SEGMENT.findall(word):
            if "a" <= segment[0] <= "z":
                parts.append(segment)
            elif segment in self._id_of_piece:
                parts.append(_packed([self._id_of_piece[segment]]))
            else:
                parts.append(_packed([self._id_of_byte[byte] for byte in segment.encode()]))
        return tuple(parts)

    def normalize(self, caption: str) -> str:
        """The caption as the model sees it: casefolded, NFKC, whitespace collapsed, spaces written as U+2581."""
        if PLAIN.fullmatch(caption):  # nearly every caption: four times as fast
            return SPACE.join(caption.lower().split())
        return self._processor.normalize(_valid_unicode(caption))

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text; negative ids (pads) are left out, bytes that form no character become U+FFFD."""
        return self._processor.decode([int(i) for i in ids if i >= 0])

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTokenizer, (self.model_bytes,)


def _packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def train_tokenizer(captions: Iterable[str], vocab_size: int, path: str | Path) -> CaptionTokenizer:
    """Learn the merges from captions and write the .model file.

    Captions are streamed: memory grows with the distinct words, not with the captions. The same captions in any order give
    the same bytes. Where the captions have too few distinct letter pairs for `vocab_size`, the vocabulary is as large as they
    support (`vocab_size` of the result), and that is logged.

    Raises:
        ConfigError: `vocab_size` is below the bytes and single characters that every model needs.
        DataError: the captions hold no word of a-z.
    """
    words, singles, n_captions = _count(captions)
    if not words:
        raise DataError(f"no word of a-z in {n_captions} captions: nothing to train a tokenizer on")
    required = ASCII_SINGLES + _frequent_characters(words, singles)
    floor = N_BYTES_AND_UNKNOWN + len(required) + len(string.ascii_lowercase)
    if vocab_size < floor:
        raise ConfigError(
            f"tokenizer vocab_size is {vocab_size}, expected at least {floor}: 256 bytes, the unknown mark, a-z "
            f"and {len(required)} other single characters"
        )
    tokenizer = CaptionTokenizer(_train(words, required, vocab_size))
    lost = [c for c in required + string.ascii_lowercase if c not in tokenizer._id_of_piece]
    assert not lost, f"sentencepiece left out required characters {lost}"
    if tokenizer.vocab_size < vocab_size:
        log.info(
            "tokenizer: %d tokens asked for, %d made: %d captions of %d distinct words have no more merges to learn",
            vocab_size,
            tokenizer.vocab_size,
            n_captions,
            len(words),
        )
    write_bytes(path, tokenizer.model_bytes)
    return tokenizer


def _count(captions: Iterable[str]) -> tuple[Counter[str], Counter[str], int]:
    """Counts of a-z words and of other characters after normalisation, and the number of captions."""
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=NORMALIZATION, add_dummy_prefix=False, remove_extra_whitespaces=True, escape_whitespaces=True
    )
    words: Counter[str] = Counter()
    singles: Counter[str] = Counter()
    n_captions = 0
    for caption in captions:
        n_captions += 1
        for segment in SEGMENT.findall(normalizer.normalize(_valid_unicode(caption))):
            (words if "a" <= segment[0] <= "z" else singles)[segment] += 1
    return words, singles, n_captions


def _frequent_characters(words: Counter[str], singles: Counter[str]) -> str:
    """Non-ASCII characters worth a token: by falling count, until CHARACTER_COVERAGE of all characters is reached."""
    other = {c: n for c, n in singles.items() if c not in ASCII_SINGLES}
    total = sum(len(word) * n for word, n in words.items()) + singles.total()
    uncovered = sum(other.values())
    kept = []
    for character, n in sorted(other.items(), key=lambda item: (-item[1], item[0])):
        if uncovered <= (1.0 - CHARACTER_COVERAGE) * total:
            break
        kept.append(character)
        uncovered -= n
    return "".join(kept)


def _train(words: Counter[str], required: str, vocab_size: int) -> bytes:
    """Model bytes. Training on words alone, not captions, is what keeps every merge inside a-z."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_word_lines(words),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # else too few merges are an error instead of a smaller vocabulary
        normalization_rule_name=NORMALIZATION,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=required,
        split_digits=True,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,  # start-of-text and pads are the model's own vectors, not tokens
        max_sentence_length=4 * MAX_WORD_LETTERS,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _word_lines(words: Counter[str]) -> Iterator[str]:
    # The most frequent words, ties by spelling: what is cut off must not depend on the order of the captions.
    usable = ((word, n) for word, n in words.items() if len(word) <= MAX_WORD_LETTERS)
    chosen = sorted(usable, key=lambda item: (-item[1], item[0]))[:MAX_DISTINCT_WORDS]
    for word, n in chosen:
        yield f"{word}\t{n}"
    # Every letter once more as a word of its own: required_chars is no way to ask for letters, because the trainer takes
    # characters by falling count and stops, required or not, where all of the text is covered, judged in single precision.
    # A count far from 0 keeps them all.
    n_letters = sum(len(word) * n for word, n in chosen)
    for letter in string.ascii_lowercase:
        yield f"{letter}\t{max(n_letters, 1)}"


def _valid_unicode(text: str) -> str:
    # A lone surrogate (half an emoji, cut by a crawler) has no UTF-8 form; sentencepiece would raise on it.
    return text.encode("utf-8", "replace").decode("utf-8")
