"""`dalle-ds eval images`: the real Inception network with random weights, a small CLIP, the command, the cache."""

import hashlib
import importlib.util
import json
import math
import os
import pickle
import sys
import tarfile
from collections import Counter
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dalle_ds.cli import app
from dalle_ds.commands.eval.images import METRICS, Extractor, captioned, evaluate_images, load_extractor
from dalle_ds.data.raw import metadata
from dalle_ds.errors import ConfigError, DataError
from dalle_ds.evaluation import image_sets
from dalle_ds.evaluation.caption_retrieval import score_among
from dalle_ds.evaluation.fid import frechet_distance, moments
from dalle_ds.evaluation.image_sets import open_images, prepare
from dalle_ds.evaluation.inception_score import inception_score
from dalle_ds.pretrained import inception
from dalle_ds.pretrained.clip import Clip
from tests.evaluation.test_fid import draw, plain_fid
from tests.support.clip_models import make_clip

FIDELITY = importlib.util.find_spec("torch_fidelity")
NEEDS_FIDELITY = pytest.mark.skipif(FIDELITY is None, reason="no torch-fidelity (pip install --no-deps torch-fidelity)")


def save_images(folder, n, *, seed=0, noise=0.0, side=32):
    """Write smooth random images with a samples.json, two per caption. Equal seeds give equal images except for the noise."""
    folder.mkdir(parents=True)
    rng, noise_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    images = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(80, 176, (4, 4, 3), dtype=np.uint8))
        smooth = coarse.resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + noise * noise_rng.normal(size=(side, side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
        images.append({"file": f"{i:03d}.png", "caption": f"caption {i // 2}"})
    (folder / "samples.json").write_text(json.dumps({"images": images}))
    return folder


def pixel_extractor(mark="v1", calls=None):
    """A feature extractor for tests: mean and standard deviation of the pixels in 8 x 8 blocks of the image."""

    def features(images_BHWC):
        if calls is not None:
            calls.append(len(images_BHWC))
        blocks = torch.from_numpy(images_BHWC).float().mean(3).unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2).flatten(2)
        return torch.cat([blocks.mean(2), blocks.std(2)], dim=1), None

    return Extractor("pixels", mark, features)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A weights file for torch-fidelity's network, with random weights large enough that features differ between images."""
    network_class = inception._network_class()
    module = sys.modules[network_class.__module__]

    class Drawn(network_class):
        def load_state_dict(self, state):
            assert state == {}  # nothing is downloaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        network = Drawn("drawn", ["2048"])
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for weight in state.values():
        if weight.ndim > 1:
            weight.normal_(std=math.sqrt(2 / weight[0].numel()), generator=generator)
    state["fc.weight"] *= 30
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def fidelity_metrics(monkeypatch):
    """Import torch-fidelity's two metric modules without the parts of the package that need torchvision."""
    bare = ModuleType("torch_fidelity")
    bare.__path__ = list(FIDELITY.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", bare)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", MagicMock())
    from torch_fidelity import metric_fid, metric_isc

    return metric_fid, metric_isc


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "images", *map(str, arguments)], catch_exceptions=False)


@NEEDS_FIDELITY
def test_scores_are_those_of_torch_fidelity_on_the_same_features(fidelity_metrics):
    metric_fid, metric_isc = fidelity_metrics
    a, b = draw(500, 96, 1), draw(700, 96, 2)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(theirs, rel=1e-3)

    logits = draw(500, 40, 3, shift=0)
    order = np.random.default_rng(0).permutation(len(logits))  # torch-fidelity shuffles with a different generator
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits[order]), splits=10, shuffle=False)
    ours = inception_score(logits, n_splits=10)
    assert ours.score == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-6)


@NEEDS_FIDELITY
def test_inception_from_a_weights_file_by_the_command(inception_weights, tmp_path, monkeypatch):
    samples, real = save_images(tmp_path / "samples", 20), save_images(tmp_path / "real", 4, seed=1, side=40)
    seen, plain = [], inception.Inception.features
    monkeypatch.setattr(inception.Inception, "features", lambda self, images: seen.append(plain(self, images)) or seen[-1])
    done = run(
        "--images",
        samples,
        "--reference",
        real,
        "--extractor",
        "inception",
        "--inception-weights",
        inception_weights,
        "--blur",
        1,
        "--resamples",
        2,
        "--batch",
        20,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert done.exit_code == 0
    result = json.loads((tmp_path / "out" / METRICS).read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    assert result["extractor_fingerprint"] == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert (result["n"], result["n_reference"], result["size"]) == (20, 4, 32)

    (ours, logits), (theirs, _) = seen
    network = inception._network_class()("plain", ["2048", "logits_unbiased"], str(inception_weights))
    entries = [next(iter(open_images(folder))) for folder in (samples, real)]
    images_BHWC = np.stack([prepare(entry, 32, 1.0) for entry in entries])
    features_BD, logits_BK = network(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2))
    torch.testing.assert_close(torch.stack([ours[0], theirs[0]]), features_BD, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[0], logits_BK[0], rtol=1e-3, atol=1e-3)

    ours, theirs = ours.double().numpy(), theirs.double().numpy()
    basis = np.linalg.qr(np.concatenate([ours, theirs]).T)[0]  # a rotation into the subspace that 24 images span
    assert result["fid"] == pytest.approx(plain_fid(ours @ basis, theirs @ basis), rel=1e-3)
    assert result["inception_score"] == pytest.approx(inception_score(logits.numpy()).score, rel=1e-6)
    assert result["fid"] > 0.05 and result["inception_score"] > 1.01  # neither score is trivial
    assert Image.open(tmp_path / "out" / "image_metrics.png").width > 600


def test_clip_features_and_clip_score_by_the_command(clip_folder, tmp_path):
    samples, real = save_images(tmp_path / "samples", 12), save_images(tmp_path / "real", 16, seed=1)
    extractor = f"clip:{clip_folder}"
    done = run(
        "--images",
        samples / "samples.json",
        "--reference",
        real,
        "--extractor",
        extractor,
        "--clip",
        clip_folder,
        "--out",
        tmp_path / "out",
        "--batch",
        5,
        "--json",
    )
    assert done.exit_code == 0
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["blur"] for row in result["by_blur"]] == [0, 1, 2, 4, 8]
    assert result["fid"] == result["by_blur"][0]["fid"] != result["by_blur"][2]["fid"]
    assert "inception_score" not in result  # CLIP has no classes

    clip = Clip.load(clip_folder)
    images = [Image.open(samples / f"{i:03d}.png") for i in range(12)]
    cosines = (clip.image_features(images) * clip.text_features([f"caption {i // 2}" for i in range(12)])).sum(1)
    assert result["clip_score"] == pytest.approx(100 * cosines.mean().item(), rel=1e-4)
    assert result["clip_score_low"] < result["clip_score"] < result["clip_score_high"]
    assert result["clip_fingerprint"] == result["extractor_fingerprint"] == clip.fingerprint
    (real / "samples.json").unlink()
    with pytest.raises(DataError, match="image 000.png has no caption"):
        captioned(clip, open_images(real))


def test_blur_hides_what_only_high_frequencies_tell(tmp_path):
    """Figure 9: if samples differ from real images only in fine detail, blurring both sides lowers the FID."""
    samples, real = save_images(tmp_path / "samples", 80, noise=40), save_images(tmp_path / "real", 80)
    result = evaluate_images(str(samples), tmp_path / "out", reference=[str(real)], extractor=pixel_extractor())
    fids = [row["fid"] for row in result["by_blur"]]
    assert fids[0] > 4 * fids[1] and fids[1] > 2 * fids[2] > 2 * fids[3], fids
    assert all(row["fid_low"] < row["fid"] < row["fid_high"] and row["n"] == 80 for row in result["by_blur"])


def test_statistics_are_extracted_once_and_kept_for_like_measures_only(tmp_path):
    samples, real = str(save_images(tmp_path / "samples", 6)), str(save_images(tmp_path / "real", 10, seed=1))
    cache = tmp_path / "cache"

    def measure(calls, **changes):
        options = {"reference": [real], "extractor": pixel_extractor(calls=calls), "radii": [0, 2], "cache": cache, "batch": 4}
        result = evaluate_images(samples, tmp_path / "out", **{**options, **changes})
        return [row["fid"] for row in result["by_blur"]]

    first, second, third = [], [], []
    fids = measure(first)
    assert first == [4, 4, 2, 2, 4, 4, 4, 4, 2, 2] and len(list(cache.iterdir())) == 2
    assert measure(second) == fids and second == [4, 4, 2, 2]  # the reference is not extracted again
    files = sorted(map(str, cache.iterdir()))
    assert measure(third, reference=files) == fids and third == second
    for change, message in (
        ({"extractor": pixel_extractor("v2")}, "pixels v1 at 32 pixels.*expected pixels v2 at 32 pixels"),
        ({"size": 16}, "at 32 pixels.*expected pixels v1 at 16 pixels"),
        ({"radii": [0, 1]}, "expected pixels v1 at 32 pixels, blur 1"),
    ):
        with pytest.raises(DataError, match=message):
            measure([], reference=files, **change)
    Image.new("RGB", (32, 32)).save(tmp_path / "real" / "000.png")  # changes the reference
    fourth = []
    assert measure(fourth) != fids and len(fourth) == 10
    with pytest.raises(ConfigError, match="expected one set of images"):
        measure([], reference=[real, files[0]])


def test_raw_shards_are_read_once_to_choose_and_once_for_all_radii(tmp_path, monkeypatch):
    samples, real = str(save_images(tmp_path / "samples", 6)), save_images(tmp_path / "real", 12, seed=1)
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for image in sorted(real.glob("*.png"))[number::2]:
                tar.add(image, image.name)
                (real / "caption").write_text("a caption")
                tar.add(real / "caption", f"{image.stem}.txt")
    for path in (tmp_path / "samples", real):
        (path / "samples.json").unlink(missing_ok=True)
    read = Counter()
    read_shard = image_sets.read_raw_shard

    def count(shard, **options):
        read[shard.name] += 1
        return read_shard(shard, **options)

    for module in (image_sets, metadata):  # these tars have no metadata to choose by
        monkeypatch.setattr(module, "read_raw_shard", count)
    options = {"reference": [str(tmp_path)], "extractor": pixel_extractor(), "radii": [0, 1, 2, 4, 8], "limit": 5}
    result = evaluate_images(samples, tmp_path / "out", **options)
    assert read == {"0": 2, "1": 2} and result["n_reference"] == 5 and len(result["by_blur"]) == 5

    monkeypatch.setattr(image_sets.tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115 - as a file
    again = evaluate_images(samples, tmp_path / "again", **options)
    assert again["by_blur"] == result["by_blur"] and read == {"0": 5, "1": 5}, "to choose, to check, to measure"


def test_retrieval_of_images_and_reference_by_the_command(clip_folder, tmp_path):
    samples, real = save_images(tmp_path / "samples", 6), save_images(tmp_path / "real", 10, seed=1)
    places = ("--images", samples, "--reference", real, "--clip", clip_folder, "--out", tmp_path / "out")
    done = run(*places, "--among", 4, "--alike", "^caption", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["among"] == 4 and result["chance"] == 0.25
    assert result["retrieval_images"]["n"] == 6 and result["retrieval_reference"]["n"] == 10
    assert set(result["retrieval_images"]["by_text"]) == {"caption"}
    clip, pool = Clip.load(clip_folder), [f"caption {i}" for i in range(5)]  # the captions of both sets
    plain = score_among(
        clip.image_features([Image.open(samples / f"{i:03d}.png") for i in range(6)]).numpy(),
        [f"caption {i // 2}" for i in range(6)],
        clip.text_features(pool).numpy(),
        pool,
        4,
    )
    assert result["retrieval_images"]["top1"] == plain["top1"] and result["retrieval_images"]["top5"] == 1
    refused = run(*places, "--among", 4, "--alike", "(in")
    assert refused.exit_code == 2 and "'(in' is no regular expression: missing ), unterminated" in refused.stderr
    with pytest.raises(DataError, match="5 captions like 'caption 0', expected 6 or more"):
        evaluate_images(str(samples), tmp_path, clip=clip, reference=[str(real)], among=6)
    for options, message in (({"among": 2}, "--among needs --clip"), ({"clip": clip, "alike": "x"}, "--alike needs --among")):
        with pytest.raises(ConfigError, match=message):
            evaluate_images(str(samples), tmp_path, extractor=pixel_extractor(), **options)


def test_extractors_that_cannot_be(tmp_path, clip_folder):
    with pytest.raises(ConfigError, match="'resnet': expected inception or clip:PATH"):
        load_extractor("resnet")
    with pytest.raises(ConfigError, match="--inception-weights"):
        load_extractor("inception")
    with pytest.raises(ConfigError, match="no score to compute"):
        evaluate_images(str(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="--reference needs --extractor"):
        evaluate_images(str(tmp_path), tmp_path, reference=["real"], clip=Clip.load(clip_folder))
    (tmp_path / "damaged.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"1 of 1 images, 1 unreadable: damaged.png \(unreadable\)"):
        evaluate_images(str(tmp_path), tmp_path, extractor=pixel_extractor())


def test_all_images_that_cannot_be_used_are_listed_before_any_is_measured(tmp_path):
    samples, real = save_images(tmp_path / "samples", 8), save_images(tmp_path / "real", 9, seed=1)
    (samples / "samples.json").unlink()
    (real / "samples.json").unlink()
    (samples / "003.png").write_bytes(b"none")
    (samples / "003.txt").write_text("a caption")
    Image.new("RGB", (31, 400)).save(real / "001.png")
    Image.new("RGB", (400, 16)).save(real / "sub.png")
    (real / "002.png").write_bytes(b"\x89PNG")
    (real / "gone.png").symlink_to(real / "nowhere")
    (real / "folder.jpg").mkdir()
    (real / "000.txt").write_bytes("caf\xe9".encode("latin-1"))
    os.mkfifo(real / "pipe.png")
    (real / "._000.png").write_bytes(b"of macOS")
    (real / ".hidden").mkdir()
    (real / ".hidden" / "a.png").write_bytes(b"none")
    calls = []
    options = {"reference": [str(real)], "extractor": pixel_extractor(calls=calls), "radii": [0]}
    with pytest.raises(DataError) as refused:
        evaluate_images(str(samples), tmp_path / "out", **options)
    first, ours, theirs = str(refused.value).splitlines()
    assert "leave them out with max_failure_rate 0.54 or more" in first and not calls
    assert "samples: 1 of 8 images, 1 unreadable: 003.png (unreadable)" in ours
    assert "real: 7 of 13 images, 2 smaller than 32 pixels, 2 not a file, 1 " in theirs
    for name, reason in (
        ("000.png", "with a caption that is not UTF-8"),
        ("001.png", "smaller than 32 pixels"),
        ("002.png", "unreadable"),
        ("folder.jpg", "not a file"),
        ("gone.png", "a broken link"),
        ("pipe.png", "not a file"),
        ("sub.png", "smaller than 32 pixels"),
    ):
        assert f"{name} ({reason})" in theirs
    result = evaluate_images(str(samples), tmp_path / "out", **options, max_failure_rate=0.6)
    assert (result["n"], result["n_reference"], calls) == (7, 6, [7, 6])
    assert {source: len(problems) for source, problems in result["left_out"].items()} == {str(samples): 1, str(real): 7}
    for image in real.glob("*.png"):
        image.unlink()
    (real / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match="images that cannot be used\n"):
        evaluate_images(str(samples), tmp_path / "out", **options, max_failure_rate=0.99)


def test_images_without_a_caption_are_listed_too(tmp_path, clip_folder):
    samples = save_images(tmp_path / "samples", 3)
    (samples / "samples.json").unlink()
    (samples / "001.txt").write_text("a caption\n")
    with pytest.raises(DataError, match="2 of 3 images, 2 without a caption: 000.png .*, 002.png"):
        evaluate_images(str(samples), tmp_path / "out", clip=Clip.load(clip_folder))
    result = evaluate_images(str(samples), tmp_path / "out", clip=Clip.load(clip_folder), max_failure_rate=0.7)
    assert result["clip_n"] == 1


@NEEDS_FIDELITY
def test_weights_files_that_are_none_are_refused_and_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    refusals = {"evil.pth": "expected torch-fidelity's file", "other.pth": "loading state_dict", "gone.pth": "No such file"}
    for name, message in refusals.items():
        with pytest.raises(DataError, match=message):
            load_extractor("inception", inception_weights=tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_warns_of_fewer_images_than_features(tmp_path, caplog):
    folder = str(save_images(tmp_path / "images", 4))
    evaluate_images(folder, tmp_path / "out", reference=[folder], extractor=pixel_extractor(), radii=[0])
    assert "4 images for 32 features" in caplog.text


def test_metrics_of_other_images_are_not_replaced(tmp_path):
    one, other = (str(save_images(tmp_path / name, 6, seed=seed)) for name, seed in (("one", 0), ("other", 1)))
    options = {"reference": [one], "extractor": pixel_extractor(), "radii": [0]}
    evaluate_images(one, tmp_path / "out", **options)
    evaluate_images(one, tmp_path / "out", **options, n_resamples=5)
    before = (tmp_path / "out" / METRICS).read_bytes()
    with pytest.raises(ConfigError, match=r"image_metrics.json is a report about something else(.|\n)*there: images .*one"):
        evaluate_images(other, tmp_path / "out", **options)
    assert (tmp_path / "out" / METRICS).read_bytes() == before
