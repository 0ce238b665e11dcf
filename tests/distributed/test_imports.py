"""A rank imports what it uses: of a thousand ranks, each reads every file that it imports from a disk that all share."""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from dalle_ds.commands.verbs import VERBS
from tests.data.token_sets import make_token_set
from tests.support import launching

HEAVY = {
    *("mlflow", "pandas", "polars", "pyarrow", "sqlalchemy", "fastapi", "requests", "opentelemetry", "google"),  # tracking
    *("scipy", "sklearn", "skimage", "matplotlib", "imagehash", "py3langid"),  # charts, scores and filters
    *("transformers", "torch_fidelity", "gradio", "ray", "boto3", "setuptools", "emoji"),
}
"""Packages that only the main rank, another command or a setting needs."""

SPY = """
import atexit, json, os, sys
from pathlib import Path
started = []
sys.addaudithook(lambda event, given: started.append(os.fspath(given[0])) if event == "subprocess.Popen" else None)
at_end = lambda: Path(f"{os.environ['SPY']}.{os.environ['RANK']}").write_text(json.dumps([list(sys.modules), started]))
atexit.register(at_end)
"""


@pytest.mark.launch
def test_a_rank_that_is_not_the_main_one_imports_no_heavy_package_and_starts_no_compiler(
    tmp_path: Path, empty_store: Path
) -> None:
    make_token_set(tmp_path / "tokens", n_samples=32)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)  # instead of the one that launched tests have
    settings = launching.words(
        f"data.dataset={tmp_path}/tokens",
        *("folder=run", "updates=1", "global_batch=4", "micro_batch=2", "model.n_layers=2", "model.n_heads=1"),
        *("validation.samples=4", "tracking.samples_every=1", "tracking.scene_captions=0"),
    )
    command = [sys.executable, "-u", launching.TRAIN_PRIOR, *launching.TINY, *settings]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launching.free_port())}
    place |= {"PYTHONPATH": f"{launching.ROOT}:{tmp_path}/spy", "SPY": f"{tmp_path}/found"}
    place["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(launching.started(command, tmp_path, {**place, "RANK": rank, "LOCAL_RANK": rank}))
            for rank in "01"
        ]
        for rank in ranks:
            _, err = rank.communicate(timeout=900)
            assert rank.returncode == 0, err[-4000:]
    main, other = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in "01")
    assert {"mlflow", "scipy"} <= set(main[0])  # it tracks the run and draws samples
    assert HEAVY & set(other[0]) == set()
    assert set(other[1]) <= {"numactl"}  # DeepSpeed asks it for the cores, on CPUs


def test_what_ranks_run_imports_no_heavy_package() -> None:
    works = [verb.work.partition(":")[0] for verb in VERBS if verb.ranks != "never"]
    program = f"import sys, {', '.join(works)}; print(*sys.modules)"
    done = launching.run([sys.executable, "-c", program], launching.ROOT)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "deepspeed" in found
    assert HEAVY & found == set()
