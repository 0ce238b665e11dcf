"""Sampling on two ranks with the real launcher, killed and resumed, gives the same images as one process."""

import signal
import sys
from pathlib import Path

import pytest

from dalle_ds.commands.sample import sample_export
from dalle_ds.sampling.captions import SampleSource
from dalle_ds.sampling.settings import SamplingConfig
from tests.sampling.exports import make_export
from tests.support import launching
from tests.support.images import draw_folder

pytestmark = pytest.mark.launch

CAPTIONS = [f"A red square, number {i}." for i in range(40)]


def test_killed_alone_and_gone_on_with_on_two_ranks_is_one_run(tmp_path: Path) -> None:
    export, parts = make_export(tmp_path), tmp_path / "out" / ".parts"
    image = draw_folder(tmp_path / "images", 1) / "p0000.png"
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    options = [
        "--captions",
        "captions.txt",
        "n=6",
        "--batch",
        "2",
        "--image-prompt",
        str(image),
        "--prompt-rows",
        "1",
        "--out",
        "out",
    ]
    command = ["dalle_ds.cli", "sample", str(export), *options, "--json"]
    with launching.started([sys.executable, "-m", *command], tmp_path) as process:
        launching.wait_for(lambda: len(list(parts.glob("*.npz"))) >= 3, "some batches", process=process)
        launching.kill_tree(process.pid, signal.SIGKILL)
    made_before = {part: part.stat().st_mtime_ns for part in parts.glob("*.npz")}
    assert 3 <= len(made_before) < 120 and not (tmp_path / "out" / "samples.json").exists(), "it was faster than the kill"

    launch = [*launching.deepspeed(2), "--no_local_rank", "--module", *command]
    with launching.started(launch, tmp_path) as process:
        launching.wait_for(lambda: len(list(parts.glob("*.npz"))) > len(made_before), "another batch", process=process)
        assert all(part.stat().st_mtime_ns == made for part, made in made_before.items()), "a finished batch was drawn again"
        out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-4000:]
    assert out.count('{"out"') == 1 and launching.last_json(out)["images"] == 240

    source = SampleSource(captions=CAPTIONS, image_prompt=image, prompt_rows=1)
    sample_export(str(export), tmp_path / "alone", SamplingConfig(n=6, batch=2), source)
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.png"))
    assert len(names) == 242  # includes grid.png and image_prompt.png
    for name in [*names, "codes.npy"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
