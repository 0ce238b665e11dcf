"""The tokenizer follows the paper's splitting rule; BPE dropout is deterministic."""

import itertools
import logging
import pickle
import random
import re
import string

import numpy as np
import pytest
import sentencepiece

from dalle_ds.data import bpe_dropout
from dalle_ds.data.bpe_dropout import merge_word
from dalle_ds.data.sample_seeds import sample_generators
from dalle_ds.data.tokenizer import SEGMENT, SPACE, CaptionTokenizer, _count, train_tokenizer
from dalle_ds.errors import ConfigError, DataError

ADJECTIVES = ["red", "green", "blue", "small", "smiling", "grinning", "wooden", "medium-dark"]
NOUNS = ["face", "cat", "umbrella", "clock", "person", "snowboarder", "woman's hat", "o'clock", "café", "piñata"]
PLACES = ["on a table", "in the park", "with 2 eyes", "at 10:30", "(skin tone)", "beside 1,000 stars!"]
CAPTIONS = [f"A {a} {n} {p}" for a, n, p in itertools.product(ADJECTIVES, NOUNS, PLACES)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CaptionTokenizer:
    return train_tokenizer(CAPTIONS, 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def odd_captions(n: int, seed: int = 0) -> list[str]:
    """Words of the captions, cut, joined and mixed with capitals, digits, scripts, emoji, controls, unpaired surrogates."""
    rng = random.Random(seed)
    words = " ".join(CAPTIONS).split()
    spice = [
        "😀",
        "👩‍🚀",
        "日本語",
        "Straße",
        "ﬁ",
        "İstanbul",
        "\u00a0",
        "\t",
        "  ",
        "\n",
        "007",
        "x²",
        "3.14",
        "don't",
        "\u2581",
        "<0x41>",
        "<unk>",
        "e\u0301",
        "\u200d",
        "A\u030a",
        "½",
        "\x00",
        "\ud83d",
        "ok…",
        "#hash_tag",
        "a-b",
        "ΑΒΓ",
        "Жук",
        "👍🏽",
        "''",
        "zzzqqq",
        "supercalifragilistic",
    ]
    captions = ["", " ", "a", SPACE, "a" * 300]
    for _ in range(n):
        parts = [rng.choice(words if rng.random() < 0.6 else spice) for _ in range(rng.randint(1, 12))]
        parts = [part[: rng.randint(1, len(part))] if rng.random() < 0.3 else part for part in parts]
        parts = [part.upper() if rng.random() < 0.1 else part for part in parts]
        captions.append(rng.choice([" ", "", " ", "  "]).join(parts))
    return captions


def piece(tokenizer: CaptionTokenizer, token: int) -> str:
    """The vocabulary's text of a token: a space is U+2581, a byte is <0x..>."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).id_to_piece(token)


def encode_with_dropout(tokenizer: CaptionTokenizer, caption: str, p: float, rng: np.random.Generator) -> list[int]:
    return np.frombuffer(tokenizer.pack_with_dropout(caption, p, rng), dtype=np.int32).tolist()


def test_every_merged_piece_is_letters_alone(tokenizer):
    pieces = [piece(tokenizer, i) for i in range(257, tokenizer.vocab_size)]
    assert piece(tokenizer, 0) == "<unk>" and piece(tokenizer, 1) == "<0x00>" and piece(tokenizer, 256) == "<0xFF>"
    merged = [piece for piece in pieces if len(piece) > 1]
    assert len(merged) > 100
    assert [piece for piece in merged if not re.fullmatch("[a-z]+", piece)] == []


def test_all_ascii_singles_and_frequent_others_have_a_piece(tokenizer):
    pieces = {piece(tokenizer, i) for i in range(tokenizer.vocab_size)}
    assert set(string.ascii_lowercase + string.digits + string.punctuation + SPACE) <= pieces  # no caption contains q, z or 7
    assert {"é", "ñ"} <= pieces


def test_a_caption_is_the_concatenation_of_its_segments(tokenizer):
    space = tokenizer.encode("a b")[1]
    assert piece(tokenizer, space) == SPACE
    for caption in odd_captions(400):
        segments = SEGMENT.findall(tokenizer.normalize(caption))
        alone = [[space] if segment == SPACE else tokenizer.encode(segment) for segment in segments]
        assert tokenizer.encode(caption) == sum(alone, []), caption


def test_digits_punctuation_and_spaces_are_single_tokens(tokenizer):
    pieces = [piece(tokenizer, i) for i in tokenizer.encode("A  RED cat's 10:30")]
    assert pieces == ["a", SPACE, "red", SPACE, "cat", "'", "s", SPACE, "1", "0", ":", "3", "0"]


def test_without_tokens_for_spaces_words_keep_theirs(tokenizer, tmp_path):
    tight = train_tokenizer(CAPTIONS, tokenizer.vocab_size, tmp_path / "tight.model", spaces=False)
    again = CaptionTokenizer(tmp_path / "tight.model")
    for caption in ("A  RED cat's 10:30", "two blue stars", " a"):
        pieces = [piece(tight, i) for i in again.encode(caption)]
        assert pieces == [piece(tokenizer, i) for i in tokenizer.encode(caption) if piece(tokenizer, i) != SPACE]
        assert encode_with_dropout(tight, caption, 0.0, np.random.default_rng(0)) == tight.encode(caption)
    assert len(encode_with_dropout(tight, "two blue stars", 1.0, np.random.default_rng(0))) == len("twobluestars")
    assert tight.decode(tight.encode("two blue stars")) == "twobluestars" and tight.fingerprint != tokenizer.fingerprint


def test_unseen_characters_fall_back_to_bytes_and_come_back(tokenizer):
    assert [piece(tokenizer, i) for i in tokenizer.encode("😀")] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(tokenizer.encode("Red 😀 日本 cat")) == "red 😀 日本 cat"
    assert tokenizer.decode([*tokenizer.encode("red cat"), -1, -1]) == "red cat"
    assert tokenizer.encode("") == tokenizer.encode(" \t\n ") == []


def test_merge_loop_equals_sentencepiece_without_dropout(tokenizer):
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    ascii_rng = random.Random(1)
    plain = ["".join(map(chr, ascii_rng.choices(range(32, 127), k=ascii_rng.randint(0, 40)))) for _ in range(1500)]
    for caption in [*odd_captions(1500, seed=1), *plain]:
        expected = processor.encode(caption.encode("utf-8", "replace").decode())
        assert tokenizer.encode(caption) == expected, caption
        assert encode_with_dropout(tokenizer, caption, 0.0, rng) == expected, caption
    assert rng.bit_generator.state == before


def test_merge_loop_takes_the_leftmost_of_equal_pairs(tmp_path):
    tokenizer = train_tokenizer(["aa aab banana nana lalala zzz"] * 3, 400, tmp_path / "t.model")
    rng = random.Random(0)
    for _ in range(300):
        word = "".join(rng.choice("abnlz") for _ in range(rng.randint(1, 14)))
        assert encode_with_dropout(tokenizer, word, 0.0, np.random.default_rng()) == tokenizer.encode(word), word


def test_dropout_is_a_function_of_the_generator_and_keeps_the_text(tokenizer):
    caption = "A smiling snowboarder beside 1,000 umbrellas 😀"
    runs = [encode_with_dropout(tokenizer, caption, 0.3, np.random.default_rng(seed)) for seed in range(50)]
    assert runs == [encode_with_dropout(tokenizer, caption, 0.3, np.random.default_rng(seed)) for seed in range(50)]
    assert len({tuple(ids) for ids in runs}) > 25
    assert {tokenizer.decode(ids) for ids in runs} == {caption.lower()}


def test_kept_states_merge_as_the_plain_algorithm(tokenizer, monkeypatch):
    """Compares word by word, draw by draw, while cached states are cleared and long words bypass the cache."""
    monkeypatch.setattr(bpe_dropout, "MAX_WAYS", 200)
    monkeypatch.setattr(bpe_dropout, "DRAWS", 7)
    letters = random.Random(4)
    for seed in range(400):
        words = ["".join(letters.choices("aeinorst", k=letters.choice([1, 2, 5, 9, 31, 32, 33, 70]))) for _ in range(6)]
        p = letters.choice([0.02, 0.1, 0.5, 0.9])
        rng = np.random.default_rng(seed)
        drops = (rng.random() < p for _ in itertools.count())
        plain = [
            [tokenizer._id_of_piece[piece] for piece in merge_word(word, tokenizer._rank_of_piece, drops)] for word in words
        ]
        space = tokenizer._id_of_piece[SPACE]
        expected = [i for ids in plain for i in [space, *ids]][1:]
        assert encode_with_dropout(tokenizer, " ".join(words), p, np.random.default_rng(seed)) == expected, words


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**70 + 5])
@pytest.mark.parametrize("n", [3, 40])
def test_samples_are_seeded_as_numpy_does(seed, n):
    epochs, indices = np.arange(n) % 3, np.arange(n) * 104_729 + (2**32 - 2**21)
    for below in (2**32, 2**40):  # seeds of one 32-bit word, and longer seeds
        seeded = sample_generators(seed, 2, epochs, indices % below)
        for bits, epoch, index in zip(seeded, epochs.tolist(), (indices % below).tolist(), strict=True):
            expected = np.random.PCG64(np.random.SeedSequence((seed, 2, epoch, index)))
            assert bits.random_raw(4).tolist() == expected.random_raw(4).tolist()


def test_dropout_of_everything_leaves_characters(tokenizer):
    pieces = [piece(tokenizer, i) for i in encode_with_dropout(tokenizer, "red cat", 1.0, np.random.default_rng(0))]
    assert pieces == ["r", "e", "d", SPACE, "c", "a", "t"]


def test_dropout_rate_matches_the_algorithm(tmp_path):
    """ "ab" has one merge. If it is dropped, with probability p, no candidate is left and the word stays split."""
    pair = train_tokenizer(["ab ab ab"], 400, tmp_path / "ab.model")
    rng = np.random.default_rng(0)
    n_split = sum(len(encode_with_dropout(pair, "ab", 0.1, rng)) == 2 for _ in range(4000))
    assert 0.08 < n_split / 4000 < 0.12


def test_impossible_dropout_is_refused(tokenizer):
    with pytest.raises(ValueError, match="1.5"):
        encode_with_dropout(tokenizer, "a", 1.5, np.random.default_rng(0))


def test_order_of_captions_does_not_matter(tmp_path):
    shuffled = random.Random(3).sample(CAPTIONS, len(CAPTIONS))
    first = train_tokenizer(CAPTIONS, 450, tmp_path / "a.model")
    second = train_tokenizer(iter(shuffled), 450, tmp_path / "b.model")
    assert first.model_bytes == second.model_bytes == (tmp_path / "b.model").read_bytes()
    assert first.vocab_size == 450 and first.fingerprint == second.fingerprint


def test_too_large_vocabulary_becomes_as_large_as_the_captions_support(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="dalle_ds.data.tokenizer"):
        tokenizer = train_tokenizer(["a red cat", "a red hat"], 16384, tmp_path / "t.model")
    assert 300 < tokenizer.vocab_size < 500
    assert "16384" in caplog.text and str(tokenizer.vocab_size) in caplog.text
    assert len(tokenizer.encode("red")) == 1


def test_letters_that_no_caption_has_get_a_piece(tmp_path):
    tokenizer = train_tokenizer(["the " * 20 + "cat"] * 3000, 400, tmp_path / "t.model")
    assert [piece(tokenizer, i) for i in tokenizer.encode("quiz")] == ["q", "u", "i", "z"]


def test_only_the_most_frequent_words_train(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_ds.data.tokenizer.MAX_DISTINCT_WORDS", 2)
    captions = ["rarely seen", "often here", "here often"]
    models = [train_tokenizer(order, 400, tmp_path / "t.model") for order in itertools.permutations(captions)]
    assert len({model.model_bytes for model in models}) == 1
    assert len(models[0].encode("often")) == 1 and len(models[0].encode("rarely")) > 3


def test_memory_for_words_is_bounded_and_frequent_words_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_ds.data.tokenizer.MAX_COUNTED_WORDS", 50)
    rare = ["".join(letters) for letters in itertools.product("qxz", repeat=5)]  # 243 words, each in one caption
    words, _, n_captions = _count(f"a red house {word}" for word in rare)
    assert n_captions == 243 and len(words) <= 50
    assert words["house"] == words["red"] == 243


@pytest.mark.parametrize("n_rarer", [0, 20])
def test_half_of_the_words_stay_if_none_is_more_frequent(tmp_path, monkeypatch, n_rarer):
    monkeypatch.setattr("dalle_ds.data.tokenizer.MAX_COUNTED_WORDS", 50)
    words = ["".join(letters) for letters in itertools.product("qxz", repeat=4)][:51]
    captions = [f"{word} {word}" for word in words[n_rarer:]] + words[:n_rarer]
    counted, _, _ = _count(captions)
    assert len(counted) == 25 and set(counted) <= set(words[n_rarer:])
    assert set(counted.values()) == {2}
    assert _count(sorted(captions, reverse=True))[0] == counted, "the order of the captions does not decide which"
    assert len({word[0] for word in counted}) > 1
    assert train_tokenizer(captions, 400, tmp_path / "t.model").vocab_size > 256


def test_too_small_vocabulary_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match=r"is 300, expected at least 3\d\d"):
        train_tokenizer(CAPTIONS, 300, tmp_path / "t.model")


def test_captions_without_words_are_refused(tmp_path):
    with pytest.raises(DataError, match="no word of a-z in 2 captions"):
        train_tokenizer(["123", "日本"], 1000, tmp_path / "t.model")


def test_loads_from_path_and_pickle_alike(tokenizer, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    for copy in (
        CaptionTokenizer(tmp_path / "t.model"),
        pickle.loads(pickle.dumps(tokenizer)),
        CaptionTokenizer(f"file://{tmp_path}/t.model"),
    ):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("A red umbrella") == tokenizer.encode("A red umbrella")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="t.model: expected a sentencepiece .model file"):
        CaptionTokenizer(tmp_path / "t.model")
    with pytest.raises(DataError, match="absent.model: no such file"):
        CaptionTokenizer(tmp_path / "absent.model")


def test_models_of_another_splitting_rule_are_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(tmp_path / "usual"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="merges characters other than a-z"):
        CaptionTokenizer(tmp_path / "usual.model")
