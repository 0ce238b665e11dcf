"""Fingerprints: equal for equal content, different for any change."""

import numpy as np
import pytest
import torch

from dalle_ds.errors import FingerprintMismatch
from dalle_ds.storage.fingerprint import FingerprintHasher, fingerprint, require_same


def test_order_of_names_is_of_no_matter() -> None:
    a, b = torch.arange(3), np.ones(2)
    assert fingerprint({"x": 1, "y": 2}, {"a": a, "b": b}) == fingerprint({"y": 2, "x": 1}, {"b": b, "a": a})


def test_a_tensor_equals_its_array() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert fingerprint({}, {"w": values}) == fingerprint({}, {"w": torch.from_numpy(values)})
    strided = torch.from_numpy(values).T.contiguous().T  # other strides, same content
    assert fingerprint({}, {"w": strided}) == fingerprint({}, {"w": values})


def test_every_change_shows() -> None:
    base = torch.zeros(2, 3)
    variants = [
        ({"x": 1}, {"w": base}),
        ({"x": 2}, {"w": base}),
        ({"x": 1}, {"v": base}),
        ({"x": 1}, {"w": base.reshape(3, 2)}),
        ({"x": 1}, {"w": base.half()}),
        ({"x": 1}, {"w": base.bfloat16()}),
        ({"x": 1}, {"w": base + 1e-30}),
        ({"x": 1}, {}),
        ({"x": 1}, {"w": base.numpy().tobytes()}),
    ]
    marks = {fingerprint(config, arrays) for config, arrays in variants}
    assert len(marks) == len(variants)
    assert all(len(mark) >= 16 and int(mark, 16) >= 0 for mark in marks)


def test_value_is_that_of_the_first_version_however_it_is_computed() -> None:
    arrays = {"b.10": torch.arange(6.0).view(2, 3), "b.2": torch.ones(3).bfloat16(), "a": np.arange(4), "t": b"text"}
    hasher = FingerprintHasher({"x": 1})
    for name in sorted(arrays):
        hasher.add(name, arrays[name])
    assert hasher.value() == fingerprint({"x": 1}, arrays) == "7bb8631fbbad382df7c9", "old manifests would not fit"
    with pytest.raises(ValueError, match="b.10 was added after t, expected ascending names"):
        hasher.add("b.10", arrays["b.10"])


def test_mismatch_tells_both() -> None:
    require_same("dVAE", "aa", "aa")
    with pytest.raises(FingerprintMismatch, match="tokenizer of X: expected fingerprint aa, found bb. Mend it.") as caught:
        require_same("tokenizer of X", "aa", "bb", "Mend it.")
    assert (caught.value.expected, caught.value.found) == ("aa", "bb")
