"""The Python interface gives the same images, codes and losses as the commands; errors name value and expectation."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import dalle_ds
from dalle_ds.cli import app
from dalle_ds.commands.eval.loss import evaluate_export
from dalle_ds.data.raw.shards import RawSample
from dalle_ds.interface.model import Model, SampleOptions
from dalle_ds.sampling.export import load_export
from dalle_ds.sampling.settings import SampleOptionsConfig, SamplingConfig
from dalle_ds.sampling.validation_samples import read_validation
from preprocessing.encoding.encode_shard import crop_of, load_dvae
from preprocessing.encoding.encoder import encoder_of
from tests.sampling.exports import edit_config, make_export
from tests.support.clip_models import make_clip

CAPTIONS = ["A red square in the middle.", "A blue ring on the left."]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(export) -> Model:
    return dalle_ds.load(export, device="cpu")


def drawn_by_command(export, out, *options: str) -> tuple[dict, list[np.ndarray]]:
    command = ["sample", str(export), "--out", str(out), "--device", "cpu", *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads((out / "samples.json").read_text())
    return record, [np.asarray(Image.open(out / image["file"])) for image in record["images"]]


def assert_same(samples: list[dalle_ds.Sample], record: dict, images: list[np.ndarray]) -> None:
    assert [(it.caption, it.seed, it.score) for it in samples] == [
        (image["caption"], image["seed"], image.get("score")) for image in record["images"]
    ]
    for sample, image in zip(samples, images, strict=True):
        assert np.array_equal(np.asarray(sample.image), image)


def random_images(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


# Sampling -----------------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_command(export, model, clip, tmp_path):
    settings = ["--n", "5", "--keep", "2", "--seed", "7", "--temperature", "0.8", "--top-k", "9", "--batch", "4"]
    captions = [part for caption in CAPTIONS for part in ("--caption", caption)]
    record, images = drawn_by_command(export, tmp_path / "out", *captions, *settings, "--clip", str(clip))
    options = {"n": 5, "keep": 2, "seed": 7, "temperature": 0.8, "top_k": 9, "batch": 4}
    samples = model.sample(CAPTIONS, scorer=clip, **options)
    assert [len(of_one) for of_one in samples] == [2, 2] and samples[0][0].score >= samples[0][1].score
    assert_same([sample for of_one in samples for sample in of_one], record, images)
    with_own = dalle_ds.load(export, "cpu", scorer=dalle_ds.load_scorer(clip, "cpu")).sample(tuple(CAPTIONS), **options)
    assert_same([sample for of_one in with_own for sample in of_one], record, images)


def test_one_caption_gives_a_flat_list_by_the_defaults_of_the_command(export, model, tmp_path):
    record, images = drawn_by_command(export, tmp_path / "out", "--caption", CAPTIONS[0])
    samples = model.sample(CAPTIONS[0])
    assert len(samples) == SamplingConfig().n and samples[0].score is None
    assert_same(samples, record, images)
    for sample in samples:
        assert sample.codes.shape == (16,) and sample.codes.dtype == torch.int64
        assert np.array_equal(np.asarray(model.decode(sample.codes[None])[0]), np.asarray(sample.image))


def test_image_to_image_is_that_of_the_command(export, model, tmp_path):
    given = Image.fromarray(random_images(1, 12, 20)[0])
    file = io.BytesIO()
    given.save(file, "png")
    (tmp_path / "given.png").write_bytes(file.getvalue())
    options = ["--image-prompt", str(tmp_path / "given.png"), "--prompt-rows", "2", "--caption", CAPTIONS[0], "--n", "3"]
    record, images = drawn_by_command(export, tmp_path / "out", *options)
    for image in (tmp_path / "given.png", file.getvalue(), given):
        assert_same(model.sample(CAPTIONS[0], image_prompt=image, prompt_rows=2, n=3), record, images)
    assert len(model.sample("", image_prompt=given, n=2)) == 2, "variations"


def test_options_have_the_names_and_types_of_the_settings():
    """`SampleOptions` only helps editors: `SampleOptionsConfig` defines names, types, defaults and bounds."""
    fields = SampleOptionsConfig.model_fields
    assert {name: field.annotation for name, field in fields.items()} == SampleOptions.__annotations__


def test_the_settings_of_the_export_are_the_defaults_everywhere(export, tmp_path):
    """Naming the same values gives the same images; the record and the summary have the numbers."""
    meant = tmp_path / "meant"
    shutil.copytree(export, meant)
    edit_config(meant, caption_dropout=0.1, sampling={"temperature": 0.5, "guidance": 2.0})
    model, one = dalle_ds.load(meant, device="cpu"), ("--caption", CAPTIONS[0], "--n", "2")
    record, images = drawn_by_command(meant, tmp_path / "unnamed", *one)
    assert (record["settings"]["temperature"], record["settings"]["guidance"]) == (0.5, 2.0)
    named, same_images = drawn_by_command(meant, tmp_path / "named", *one, "--temperature", "0.5", "--guidance", "2")
    assert named["settings"] == record["settings"] and np.array_equal(images, same_images)
    assert_same(model.sample(CAPTIONS[0], n=2), record, images)
    assert_same(model.sample(CAPTIONS[0], n=2, temperature=None, guidance=2.0), record, images)
    plain, plain_images = drawn_by_command(meant, tmp_path / "plain", *one, "--temperature", "1", "--guidance", "1")
    assert not np.array_equal(images, plain_images)
    assert_same(dalle_ds.load(export, device="cpu").sample(CAPTIONS[0], n=2), plain, plain_images)
    again, repeated = drawn_by_command(meant, tmp_path / "again", "--repeat", str(tmp_path / "plain" / "samples.json"))
    assert again["settings"] == plain["settings"] and np.array_equal(repeated, plain_images), "--repeat takes the record's"


def test_a_scorer_of_ones_own(model):
    class Darkest:
        name, fingerprint = "darkest", "1"

        def scores(self, captions, images):
            return np.array([-np.asarray(image).mean() for image in images], dtype=np.float32)

    everything = model.sample(CAPTIONS[0], n=6)
    (darkest,) = model.sample(CAPTIONS[0], n=6, keep=1, scorer=Darkest())
    assert -darkest.score == pytest.approx(min(np.asarray(sample.image).mean() for sample in everything))


# Codes and images ---------------------------------------------------------------------------------------------------------


def test_codes_are_those_of_the_encode_stage(export, model):
    """Images that need a crop, a conversion or a rotation give the same codes as in preprocessing."""
    dvae, _ = load_dvae(str(export / "dvae.safetensors"))
    encode = encoder_of(dvae, "fp32", "cpu")
    wide, tall = (Image.fromarray(random_images(1, *size, seed=3)[0]) for size in ((23, 41), (64, 30)))
    rotated = Image.fromarray(random_images(1, 17, 29, seed=4)[0])
    rotated.getexif()[0x0112] = 6
    see_through = wide.copy()
    see_through.putalpha(90)
    images, keys, crops = [wide, tall, rotated, see_through, wide.convert("L"), wide], [], []
    files = []
    for number, image in enumerate(images):
        file = io.BytesIO()
        image.save(file, "png", exif=image.getexif())
        keys.append(f"sample-{number}")
        files.append(Image.open(file))
        sample = RawSample(key=keys[-1], caption="", group="", extension="png", image=file.getvalue())
        crops.append(crop_of(sample, model.image_size))
    expected_BN = torch.from_numpy(encode(np.stack(crops)))
    codes_BN = model.encode(files, keys=keys)
    assert codes_BN.dtype == torch.int64 and codes_BN.shape == (6, 16)
    assert torch.equal(codes_BN, expected_BN)
    assert len({tuple(codes) for codes in codes_BN.tolist()}) == 6, "every image has codes of its own"


def test_one_image_has_the_same_codes_in_every_form(model):
    images_BHWC = random_images(40, 19, 14)  # more than one batch of the encoder
    codes_BN = model.encode(images_BHWC)
    assert torch.equal(model.encode(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)), codes_BN)
    assert torch.equal(model.encode([Image.fromarray(image) for image in images_BHWC]), codes_BN)
    assert torch.equal(model.encode(list(images_BHWC)), codes_BN)
    assert torch.equal(model.encode(Image.fromarray(images_BHWC[5])), codes_BN[5:6])


def test_an_image_of_the_models_size_stays_whole(model):
    images_BHWC = random_images(3, model.image_size, model.image_size)
    whole_BN = load_export(model._export.url).dvae.tokens(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2))
    assert torch.equal(model.encode(images_BHWC), whole_BN)


def test_decode_takes_codes_in_every_form(model):
    codes_BN = model.encode(random_images(3, 8, 8))
    images = [np.asarray(image) for image in model.decode(codes_BN)]
    assert [image.shape for image in images] == [(8, 8, 3)] * 3
    for form in (codes_BN.numpy().astype(np.uint16), list(codes_BN), codes_BN.int()):
        assert np.array_equal([np.asarray(image) for image in model.decode(form)], images)


# Loss ---------------------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_evaluate(export, model, tmp_path):
    summary = evaluate_export(str(export), tmp_path, device="cpu")
    validation = read_validation(load_export(export))
    loss = model.loss(validation.captions, validation.image_SN)
    with np.load(tmp_path / "losses.npz") as losses:
        assert losses["keys"].tolist() == validation.keys
        assert np.array_equal(loss.per_token.numpy(), losses["nll"])
    assert loss.per_sample.shape == (32,) and loss.per_sample.dtype == loss.per_token.dtype == torch.float32
    assert float(loss.per_sample.mean()) == pytest.approx(summary["loss/validation/image"], rel=1e-6)


def test_the_loss_of_images_is_that_of_their_codes(model):
    images_BHWC = random_images(2, 15, 11)
    loss = model.loss(CAPTIONS, images_BHWC)
    assert torch.equal(loss.per_token, model.loss(CAPTIONS, model.encode(images_BHWC)).per_token)
    assert not torch.equal(loss.per_token, model.loss(CAPTIONS[::-1], images_BHWC).per_token)


# Invalid input is rejected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"ndarray, float32 \(2, 8, 8, 3\): expected .*uint8 \(B, H, W, 3\)"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\): expected"),
        (np.zeros((2, 8, 8), np.uint8), r"uint8 \(2, 8, 8\): expected"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), r"Tensor, torch.uint8 \(2, 8, 8, 3\): expected .*uint8 \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 8, 8), r"torch.float32 \(2, 3, 8, 8\): expected"),
        ("a.png", "images are a str: expected PIL images"),
        (["a.png"], "image 0 is a str: expected a PIL image"),
        ([np.zeros((8, 8), np.uint8)], r"image 0 is a ndarray, uint8 \(8, 8\): expected"),
        ([], "no images: expected"),
        (
            [Image.new("RGB", (8, 8)), Image.new("RGB", (40, 7))],
            "image 1 is too small, 40x7 pixels: expected at least 8 per side",
        ),
    ],
)
def test_images_of_another_kind_are_refused(model, images, message):
    with pytest.raises(dalle_ds.UserError, match=message):
        model.encode(images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample("a", n=2, keep=5), "keep 5 of n 2: expected keep to be at most n"),
        (lambda model: model.sample("a", n=4, keep=2), "keep 2 of n 4: choosing needs a scorer"),
        (
            lambda model: model.sample("a", temprature=0.5),
            "unknown key 'temprature' = 0.5; known here: batch, guidance, image_prompt, ",
        ),
        (lambda model: model.sample("a", prompt_image="x.png"), "did you mean image_prompt?"),
        (lambda model: model.sample(5), "captions are 5: expected a caption or a list of captions"),
        (lambda model: model.loss("a", [[1, 2]]), "images are nested lists: expected images, or codes as a tensor"),
        (lambda model: model.sample("a", n=0), "^Model.sample: n = 0: expected at least 1$"),
        (lambda model: model.sample(["a", " "]), "2 captions, 1 of them empty"),
        (lambda model: model.sample("a", guidance=2.0), "guidance 2 requires a prior trained"),
        (lambda model: model.sample("a", prompt_rows=2), "prompt_rows 2 .*expected image_prompt"),
        (lambda model: model.sample("a", image_prompt="nothing.png"), "image nothing.png cannot be read"),
        (lambda model: model.sample("a", image_prompt=Image.new("RGB", (8, 8)), prompt_rows=4), "rows 4: expected 0 to 3"),
        (lambda model: model.sample("a", scorer=3), "scorer is a int: expected a CLIP's folder"),
        (lambda model: model.sample("a", scorer="runs/no_such_folder"), "CLIP runs/no_such_folder"),
        (
            lambda model: model.decode(torch.zeros(1, 9, dtype=torch.int64)),
            r"\(1, 9\): expected integers \(B, 16\) from 0 to 31",
        ),
        (lambda model: model.decode(torch.zeros(1, 16)), r"torch.float32 \(1, 16\): expected"),
        (lambda model: model.decode(torch.full((1, 16), 32)), "codes range from 32 to 32: expected"),
        (lambda model: model.decode([torch.zeros(16), torch.zeros(9)]), "codes do not form one tensor"),
        (lambda model: model.loss(["a"], random_images(2, 8, 8)), "1 captions for 2 images: expected one caption per image"),
        (lambda model: model.loss(["a"], random_images(1, 8, 8), batch=0), "batch 0: expected at least 1"),
        (lambda model: model.encode(random_images(2, 8, 8), keys=["a"]), "1 keys for 2 images"),
    ],
)
def test_a_mistake_is_an_error_as_of_the_commands(model, call, message):
    with pytest.raises(dalle_ds.UserError, match=message):
        call(model)


def test_a_damaged_file_is_named(model):
    file = io.BytesIO()
    Image.fromarray(random_images(1, 40, 40)[0]).save(file, "png")
    damaged = Image.open(io.BytesIO(file.getvalue()[:2000]))
    with pytest.raises(dalle_ds.UserError, match="image 0 is truncated"):
        model.encode([damaged])
