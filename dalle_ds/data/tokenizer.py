"""Captions to BPE tokens: a sentencepiece model that merges only inside runs of a-z.

The rule comes from the paper's author (openai/DALL-E issue 22): captions are lower-cased and split on every character that is
not a-z. Digits, punctuation (including the apostrophe) and spaces are separate tokens and are never merged. Characters outside
the vocabulary fall back to their UTF-8 bytes; the paper does not state how it treats them. The model file's own normalization
(nmt_nfkc_cf) lower-cases captions and collapses whitespace, so the .model file works with any sentencepiece.

Unlike the paper's, a tokenizer may have no token for spaces: captions of short, common words are then half as long.
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
from dalle_ds.storage.hashing import hash_to_integer
from dalle_ds.storage.objects import read_bytes, write_bytes

log = logging.getLogger(__name__)

NORMALIZATION = "nmt_nfkc_cf"
SPLITTING_RULE = "merge a-z only"
SPACE = "\u2581"  # sentencepiece's symbol for a space
PLAIN = re.compile(r"[ -~]*")
"""Matches printable ASCII: captions that can be normalized without sentencepiece."""
MAX_CACHED_WORDS = 1 << 17
ID_BYTES = 4  # bytes of a packed id (int32)
SEGMENT = re.compile(r"[a-z]+|.", re.DOTALL)  # runs of a-z; every other character is its own segment
ASCII_SINGLES = string.digits + string.punctuation + SPACE
N_BYTES_AND_UNKNOWN = 256 + 1
# The trainer's memory grows with the number of distinct words. Words beyond the most frequent million are mostly typos, which
# do not affect the merges.
MAX_DISTINCT_WORDS = 1_000_000
MAX_COUNTED_WORDS = 8_000_000  # distinct words held while captions are counted: about a gigabyte
MAX_WORD_LETTERS = 64  # longer runs are noise (keys, "aaaa..."); the trainer's time is quadratic in the length
CHARACTER_COVERAGE = 0.9995  # sentencepiece's default; rarer characters use the byte fallback


class CaptionTokenizer:
    """Encodes captions with a trained model. Picklable. Equal fingerprints mean equal tokens.

    Args:
        model: the .model file as a path, a file:// or s3:// URL, or its bytes.
        name: of a tokenizer given as bytes, for messages.

    Raises:
        DataError: the file is missing or not a sentencepiece model, or a piece merges other characters than a-z.
    """

    def __init__(self, model: str | Path | bytes, name: str = "given as bytes") -> None:
        source = f"tokenizer {name if isinstance(model, bytes) else model}"
        try:
            self.model_bytes = model if isinstance(model, bytes) else read_bytes(model)
        except FileNotFoundError:
            raise DataError(f"{source}: no such file; `dalle-ds data tokenizer` writes it") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError as error:
            raise DataError(
                f"{source}: expected a sentencepiece .model file, found {len(self.model_bytes)} bytes of "
                f"another format ({error})"
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self._index_pieces(source)
        rule = {"kind": "caption tokenizer", "normalization": NORMALIZATION, "split": SPLITTING_RULE}
        self.fingerprint: str = fingerprint(rule, {"model": self.model_bytes})
        self._space = _packed([self._id_of_piece[SPACE]]) if SPACE in self._id_of_piece else b""
        self._dropout = DropoutEncoder(self._rank_of_piece, self._id_of_piece)
        # No merge crosses a space, so a word has the same tokens in every caption.
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
                        f"{source}: piece {piece!r} (id {i}) merges characters other than a-z; expected a model with the "
                        f"splitting rule {SPLITTING_RULE!r}, as trained by `dalle-ds data tokenizer`"
                    )
                self._rank_of_piece[piece] = -model.get_score(i)
            self._id_of_piece[piece] = i
        if len(self._id_of_byte) != 256:
            raise DataError(f"{source}: {len(self._id_of_byte)} byte pieces, expected 256 (a model trained with byte_fallback)")

    def encode(self, caption: str) -> list[int]:
        """Token ids in [0, vocab_size), without start or end tokens. Empty if the caption contains only spaces."""
        return np.frombuffer(self.pack(caption), dtype=np.int32).tolist()

    def pack(self, caption: str) -> bytes:
        """Like `encode`, but returns int32 bytes, which are many times faster to create and concatenate than lists."""
        return self._space.join(map(self._packed_word, self._words(caption)))

    def pack_with_dropout(self, caption: str, p: float, rng: np.random.Generator) -> bytes:
        """Like `pack`, with BPE dropout: each merge candidate is dropped with probability p (paper: 0.1, in training).

        The result depends only on the caption, p and the state of rng.

        Raises:
            ValueError: p is not from 0 to 1.
        """
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"BPE dropout p is {p}, expected a probability from 0 to 1")
        if p == 0.0:
            return self.pack(caption)
        return self._space.join(self._dropout.encode(map(self._segments_of_word, self._words(caption)), p, rng))

    def _words(self, caption: str) -> list[str]:
        if PLAIN.fullmatch(caption):  # nearly every caption: `normalize` and split in one step
            return caption.lower().split() or [""]
        return self.normalize(caption).split(SPACE)

    def _pack_word(self, word: str) -> bytes:
        parts = self._segments_of_word(word)
        return b"".join(part if type(part) is bytes else self._dropout.pack(part, repeat(0)) for part in parts)

    def _split_word(self, word: str) -> tuple[str | bytes, ...]:
        """Splits a word into its runs of a-z (as text) and its other characters (as packed ids)."""
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
        """The model's input: the caption casefolded, in NFKC, with collapsed whitespace and spaces replaced by U+2581."""
        if PLAIN.fullmatch(caption):  # nearly every caption, and four times faster than sentencepiece
            return SPACE.join(caption.lower().split())
        return self._processor.normalize(_valid_unicode(caption))

    def decode(self, ids: Sequence[int]) -> str:
        """The normalized text of the ids. Negative ids (padding) are skipped, and invalid UTF-8 bytes become U+FFFD.
        If the tokenizer has no token for spaces, the text has no spaces."""
        return self._processor.decode([int(i) for i in ids if i >= 0])

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTokenizer, (self.model_bytes,)


def _packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()


def train_tokenizer(captions: Iterable[str], vocab_size: int, path: str | Path, *, spaces: bool = True) -> CaptionTokenizer:
    """Learn the merges from captions and write the .model file.

    Captions are streamed: memory grows with the number of distinct words, up to MAX_COUNTED_WORDS. With fewer distinct words
    the file does not depend on the order of the captions. If the captions have too few distinct letter pairs for `vocab_size`,
    the vocabulary is smaller: see the result's `vocab_size`. A log line reports this.

    Args:
        spaces: whether a space is a token, as in the paper. If not, spaces only separate words.

    Raises:
        ConfigError: `vocab_size` is smaller than the number of bytes and single characters that every model needs.
        DataError: the captions contain no word of a-z.
    """
    words, singles, n_captions = _count(captions)
    if not words:
        raise DataError(f"no word of a-z in {n_captions} captions, expected at least one to train a tokenizer on")
    required = (ASCII_SINGLES if spaces else ASCII_SINGLES.replace(SPACE, "")) + _frequent_characters(words, singles)
    floor = N_BYTES_AND_UNKNOWN + len(required) + len(string.ascii_lowercase)
    if vocab_size < floor:
        raise ConfigError(
            f"tokenizer vocab_size is {vocab_size}, expected at least {floor}: 256 bytes, the unknown token, a-z "
            f"and {len(required)} other single characters"
        )
    tokenizer = CaptionTokenizer(_train(words, required, vocab_size))
    lost = [c for c in required + string.ascii_lowercase if c not in tokenizer._id_of_piece]
    assert not lost, f"sentencepiece left out required characters {lost}"
    if tokenizer.vocab_size < vocab_size:
        log.info(
            "tokenizer: vocab_size is %d, but the model has %d tokens: %d captions with %d distinct words have no more merges",
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
        if len(words) > MAX_COUNTED_WORDS:
            words = _more_frequent_half(words)
    return words, singles, n_captions


def _more_frequent_half(words: Counter[str]) -> Counter[str]:
    """At most half of the words, whatever the order in which they were counted."""
    # Words that are as frequent as the median leave too: most words occur once.
    median = np.median(np.fromiter(words.values(), np.int64, len(words)))
    if more_frequent := {word: n for word, n in words.items() if n > median}:
        return Counter(more_frequent)
    # Half or more are equally frequent, and none is more frequent. Hashes choose among them, because an alphabetical choice
    # would favour some letters.
    tied = [word for word, n in words.items() if n == median]
    hashes = np.fromiter(map(hash_to_integer, tied), np.uint64, len(tied))
    limit = np.partition(hashes, len(words) // 2)[len(words) // 2]
    return Counter({word: words[word] for word, is_kept in zip(tied, hashes < limit, strict=True) if is_kept})


def _frequent_characters(words: Counter[str], singles: Counter[str]) -> str:
    """Non-ASCII characters that get a token: the most frequent ones, until CHARACTER_COVERAGE of all characters is covered."""
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
    """Train and return the model's bytes. Training on single words instead of captions keeps every merge inside a-z."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_word_lines(words),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # with True, too few merges would be an error instead of a smaller vocabulary
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
        pad_id=-1,  # start-of-text and padding are embeddings of the prior, not tokens
        max_sentence_length=4 * MAX_WORD_LETTERS,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _word_lines(words: Counter[str]) -> Iterator[str]:
    # Sort by frequency, then by spelling: the selection must not depend on the order of the captions.
    usable = ((word, n) for word, n in words.items() if len(word) <= MAX_WORD_LETTERS)
    chosen = sorted(usable, key=lambda item: (-item[1], item[0]))[:MAX_DISTINCT_WORDS]
    for word, n in chosen:
        yield f"{word}\t{n}"
    # Add every letter as a word. required_chars does not guarantee letters: the trainer takes characters by descending count
    # and stops, even before required characters, when they cover the whole text in single precision. A large count keeps every
    # letter.
    n_letters = sum(len(word) * n for word, n in chosen)
    for letter in string.ascii_lowercase:
        yield f"{letter}\t{max(n_letters, 1)}"


def _valid_unicode(text: str) -> str:
    # An unpaired surrogate (such as a truncated emoji) has no UTF-8 encoding, and sentencepiece would raise.
    return text.encode("utf-8", "replace").decode("utf-8")
