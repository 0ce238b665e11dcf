"""What ranks read when they start: one of them reads the data set's files, and all have the same."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dalle_ds.data.tokens.dataset import TokenDataset
from tests.conftest import S3
from tests.data.token_sets import make_token_set
from tests.support import launching

pytestmark = [pytest.mark.launch, pytest.mark.s3]

CASES = Path(__file__).parent / "cases" / "opening.py"
N_RANKS = 3


def test_one_rank_reads_for_all(s3: S3, s3_requests: list[str], tmp_path: Path) -> None:
    """One data set is published. Encoding of the other is not finished, so the manifests of its shards are merged."""
    sizes = {"n_samples": 60, "n_validation": 13, "n_shards": 5, "block_samples": 4}
    roots = [make_token_set(f"{s3.url}/{complete}", **sizes, complete=complete) for complete in (True, False)]
    s3_requests.clear()
    launching.run_ranks(N_RANKS, CASES, str(tmp_path), *roots, cwd=tmp_path)
    requests = Counter(s3_requests)
    *found, told = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(N_RANKS)), strict=True)
    assert all("-missing: no token data set" in of_rank for of_rank in told), "no rank waits for the main rank"
    for root, of_ranks, n_manifests in zip(roots, found, (0, 5), strict=True):
        assert {of_rank["content"] for of_rank in of_ranks} == {TokenDataset(root).content_fingerprint}
        for split, n_samples in (("train", 12), ("validation", 13)):
            keys = [key for of_rank in of_ranks for key in of_rank[split]]
            assert len(keys) == len(set(keys)) == n_samples
            assert {len(of_rank[split]) - n_samples // N_RANKS for of_rank in of_ranks} <= {0, 1}
        below = f"/{root.removeprefix('s3://')}/"
        files = {request: n for request, n in requests.items() if below in request and "/data/" not in request}
        assert set(files.values()) == {1}, files
        assert sum("/manifests/" in request for request in files) == n_manifests
