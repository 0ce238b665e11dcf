"""The masks, compared with loops that follow the paper's text."""

import pytest
import torch

from dalle_ds.ops.attention.masks import Pattern, SparseMask, layer_patterns, transpose_grid


def brute_force(pattern: Pattern, n_text: int, grid: int, kernel: int) -> torch.Tensor:
    """Check every pair separately, in the grid coordinates that the paper uses."""
    n = n_text + grid * grid
    mask = torch.zeros(n, n, dtype=torch.bool)
    window = set()
    for dr in range(-(kernel // 2), kernel // 2 + 1):
        for dc in range(-(kernel // 2), kernel // 2 + 1):
            window.add(dr * grid + dc)
    for q in range(n):
        for k in range(q + 1):
            if q < n_text or k < n_text:
                mask[q, k] = True
                continue
            i, j = q - n_text, k - n_text
            if pattern is Pattern.ROW:
                mask[q, k] = j in range(i - grid, i + 1)
            elif pattern is Pattern.COLUMN:
                mask[q, k] = divmod(i, grid)[1] == divmod(j, grid)[1]
            else:
                mask[q, k] = (j - i) in window
    return mask


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize(("n_text", "grid", "kernel"), [(6, 4, 3), (3, 5, 5), (2, 8, 11), (5, 8, 5), (1, 1, 3), (4, 16, 11)])
def test_equals_brute_force(pattern: Pattern, n_text: int, grid: int, kernel: int) -> None:
    assert torch.equal(SparseMask(pattern, n_text, grid, kernel).dense(), brute_force(pattern, n_text, grid, kernel))


def test_row_of_the_papers_toy_grid_sees_the_previous_five() -> None:
    image = SparseMask(Pattern.ROW, 6, 4, 3).dense()[6:, 6:]
    assert image.sum(1).tolist() == [1, 2, 3, 4] + [5] * 12
    # the furthest visible slot is in the same column of the row above
    assert image[9].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_full_size_key_counts() -> None:
    most_keys = {pattern: int(SparseMask(pattern, 256, 32, 11).dense()[256:, 256:].sum(1).max()) for pattern in Pattern}
    assert most_keys == {Pattern.ROW: 33, Pattern.COLUMN: 32, Pattern.CONV: 61}


def test_patterns_of_the_papers_64_layers() -> None:
    patterns = layer_patterns(64)
    assert patterns[:4] == [Pattern.ROW, Pattern.COLUMN, Pattern.ROW, Pattern.ROW]
    assert [patterns.count(p) for p in (Pattern.ROW, Pattern.COLUMN, Pattern.CONV)] == [47, 16, 1]
    assert patterns[-1] is Pattern.CONV


@pytest.mark.parametrize("depth", [1, 2, 6, 18, 26])
def test_last_layer_is_convolutional_at_any_depth(depth: int) -> None:
    assert layer_patterns(depth)[-1] is Pattern.CONV


def test_no_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="n_layers is 0"):
        layer_patterns(0)


def test_transposed_grid_is_column_by_column_and_back() -> None:
    slots = torch.arange(3 + 9).expand(2, -1)
    transposed = transpose_grid(slots, 3, 3)
    assert transposed[1].tolist() == [0, 1, 2, 3, 6, 9, 4, 7, 10, 5, 8, 11]
    assert torch.equal(transpose_grid(transposed, 3, 3), slots)
