"""The human evaluation from images to the count of votes. The page runs in a real browser."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dalle_ds.cli import app
from dalle_ds.errors import DataError
from dalle_ds.evaluation.human_page import build_pages
from dalle_ds.evaluation.human_votes import TallyConfig, tally
from tests.support.browser import NEEDS_CHROMIUM, browser_page

OURS, THEIRS = (200, 0, 0), (0, 0, 200)  # the colour of an image shows which model made it
CAPTIONS = ["a cat", 'a "quoted" <b>caption</b> </script><script>alert(1)</script>', "ein Bär, größer", "a house", "a tree"]

FIRST_RED = """async () => {
    const image = document.getElementById("first"), canvas = document.createElement("canvas");
    await image.decode();
    canvas.width = canvas.height = 1;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.getContext("2d").getImageData(0, 0, 1, 1).data[0];
}"""


def make_set(folder: Path, colour: tuple[int, int, int], captions: list[str]) -> Path:
    """Two plain images per caption, the second one green. Pages must show only the first."""
    folder.mkdir()
    images = []
    for i, caption in enumerate(captions):
        for k, shade in enumerate((colour, (0, 200, 0))):
            Image.new("RGB", (64, 64), shade).save(folder / f"{i}-{k}.png")
            images.append({"file": f"{i}-{k}.png", "caption": caption})
    (folder / "samples.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture
def sets(tmp_path):
    ours = make_set(tmp_path / "ours", OURS, [*CAPTIONS, "only ours"])
    return ours, make_set(tmp_path / "theirs", THEIRS, CAPTIONS[::-1])


def command(*arguments):
    return CliRunner().invoke(app, ["eval", "human", *map(str, arguments)], catch_exceptions=False)


@NEEDS_CHROMIUM
def test_five_people_vote_in_a_browser_and_are_tallied(sets, tmp_path):
    """Five voters find our images more realistic. Their answer on captions depends on the caption, so that each occurs."""
    done = command("build", *sets, tmp_path / "pages", "--json")
    assert done.exit_code == 0
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["tasks"], summary["pages"], summary["only_ours"], summary["only_theirs"]) == (5, 1, 1, 0)
    page_file = tmp_path / "pages" / "page-000.html"
    assert not re.search(r"https?://", page_file.read_text())

    sides_seen = set()
    with browser_page(900, 950) as page:
        page.context.set_offline(True)
        page.clock.install()  # fake clock: voters' thinking time takes no real time
        page.goto(page_file.as_uri())
        for person in range(5):
            page.reload()
            page.get_by_label("Your name").fill(f"voter {person}")
            page.get_by_role("button", name="Begin").click()
            for number in range(5):
                if (person, number) == (1, 3):  # close the page, and open it again
                    page.reload()
                    page.get_by_label("Your name").fill("voter 1")
                    page.get_by_role("button", name="Begin").click()
                assert page.locator("#count").inner_text() == f"{number + 1} of 5"
                caption = page.locator("#caption").inner_text()
                assert caption in CAPTIONS
                first_red = page.evaluate(FIRST_RED)
                assert first_red in (OURS[0], THEIRS[0])
                ours, theirs = ("Image 1", "Image 2") if first_red == OURS[0] else ("Image 2", "Image 1")
                sides_seen.add(ours)
                realism, match = page.get_by_role("group").nth(0), page.get_by_role("group").nth(1)
                if person == number == 0:
                    page.get_by_role("button", name="Next").click()  # without answers, Next does nothing
                    assert page.locator("#count").inner_text() == "1 of 5"
                page.clock.run_for(5000)
                realism.get_by_label(ours).check()
                match.get_by_label({"a cat": theirs, "a tree": "Neither"}.get(caption, ours)).check()
                page.get_by_role("button", name="Next").click()
            with page.expect_download() as download:
                page.get_by_role("button", name="Save votes").click()
            download.value.save_as(tmp_path / "votes" / download.value.suggested_filename)
    assert sides_seen == {"Image 1", "Image 2"}

    files = sorted((tmp_path / "votes").iterdir())
    assert len(files) == 5
    seconds = [vote["seconds"] for file in files for vote in json.loads(file.read_text())["votes"]]
    assert min(seconds) >= 5 and max(seconds) < 60
    done = command("tally", *files, "--key", tmp_path / "pages" / "key.json", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["votes"], found["dropped_voters"], found["tasks_with_other_than_wanted_votes"]) == (25, [], 0)
    assert (found["realism_ours"], found["realism_theirs"]) == (1, 0)
    assert (found["caption_ours"], found["caption_theirs"], found["caption_neither"]) == (0.6, 0.2, 0.2)


def test_a_page_does_not_tell_whose_image_is_whose(sets, tmp_path):
    for side in sets:  # another file format, with the model's name in its metadata
        for file in side.glob("*.png") if side == sets[1] else ():
            Image.open(file).save(file, "JPEG", comment=b"made by theirs")
    build_pages(*sets, tmp_path / "pages", per_page=2)
    pages = sorted((tmp_path / "pages").glob("*.html"))
    assert [page.name for page in pages] == ["page-000.html", "page-001.html", "page-002.html"]
    text = "".join(page.read_text() for page in pages)
    assert not re.search(r"ours|theirs|image/jpeg", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert text.count("base64,") == 10


def test_links_of_the_other_side_do_not_bring_private_images_to_voters(sets, tmp_path):
    ours, theirs = sets
    (theirs / "samples.json").unlink()
    for number, file in enumerate(sorted(theirs.glob("*.png"))):
        file.with_suffix(".txt").write_text(f"caption {number}")
    (tmp_path / "private.png").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "private.png")
    with pytest.raises(DataError, match=rf"{file.name} \(a link out of the folder"):
        build_pages(ours, theirs, tmp_path / "pages")
    assert not (tmp_path / "pages").exists()


def test_sides_and_order_are_drawn_by_the_seed(tmp_path):
    captions = [f"caption {i}" for i in range(40)]
    sets = make_set(tmp_path / "ours", OURS, captions), make_set(tmp_path / "theirs", THEIRS, captions)
    keys = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_pages(*sets, tmp_path / name, seed=seed, limit=30)
        keys.append(json.loads((tmp_path / name / "key.json").read_text()))
    assert keys[0] == keys[1] and keys[0]["study"] != keys[2]["study"] and len(keys[0]["tasks"]) == 30
    lefts = [[task["left"] for task in key["tasks"]] for key in keys]
    assert lefts[0] != lefts[2] and 5 < lefts[0].count("ours") < 25
    assert [task["caption"] for task in keys[0]["tasks"]] != captions[:30]


def test_sets_without_a_common_caption_are_refused(tmp_path):
    ours, theirs = make_set(tmp_path / "ours", OURS, ["a"]), make_set(tmp_path / "theirs", THEIRS, ["b"])
    with pytest.raises(DataError, match="share no caption"):
        build_pages(ours, theirs, tmp_path / "pages")
    (theirs / "samples.json").unlink()
    with pytest.raises(DataError, match=r"0-0.png \(without a caption\)"):
        build_pages(ours, theirs, tmp_path / "pages")


class Study:
    """Write vote files and a key of `n` tasks. In even tasks, our image is on the left."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.files = folder, []
        self.tasks = [{"task": f"t{i}", "caption": "c", "left": ("ours", "theirs")[i % 2], "page": "p"} for i in range(n)]
        self.key = folder / "key.json"
        self.key.write_text(json.dumps({"study": "s", "tasks": self.tasks}))

    def vote(self, voter, realism, caption=None, seconds=9.0, study="s"):
        """Write a vote file. `realism` and `caption` have one letter per task: o ours, t theirs, n neither, - no vote."""
        votes = [
            {
                "task": task["task"],
                "realism": self._number(task, mine),
                "caption": self._number(task, match),
                "seconds": seconds,
            }
            for task, mine, match in zip(self.tasks, realism, caption or realism, strict=True)
            if mine != "-"
        ]
        self.files.append(self.folder / f"{len(self.files)}.json")
        self.files[-1].write_text(json.dumps({"study": study, "page": "p", "voter": voter, "votes": votes}))

    def _number(self, task, letter):
        return 0 if letter == "n" else 1 if {"o": "ours", "t": "theirs"}.get(letter) == task["left"] else 2

    def tally(self, **options):
        return tally(self.files, self.key, **options)


def test_majorities_ties_and_intervals(tmp_path):
    study = Study(tmp_path, 10)
    study.vote("a", "oooooooott", "oonnnooott")
    study.vote("b", "ooooooottt", "oonnnoottt")
    study.vote("c", "oooooootto", "otntnotttn")
    study.vote("d", "ttttttto--", "tottootott")
    found = study.tally(n_votes=4)
    # realism: 3 of 4 votes for ours on the first seven tasks; 2:2 on the eighth; the ninth is theirs, the last 2:1 for theirs
    assert (found["realism_ours"], found["realism_theirs"], found["realism_tie"]) == (0.7, 0.2, 0.1)
    shares = [found[f"caption_{side}"] for side in ("ours", "theirs", "neither", "tie")]
    assert shares == pytest.approx([0.3, 0.2, 0.2, 0.3])
    # formula of Wilson's interval
    p, n, z = 0.7, 10, 1.959964
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    bounds = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    assert (found["realism_ours_low"], found["realism_ours_high"]) == pytest.approx(bounds, abs=1e-6)
    assert (found["tasks_with_other_than_wanted_votes"], found["votes"]) == (2, 38)


def test_a_voter_is_left_out_for_speed_and_disagreement_together(tmp_path):
    study = Study(tmp_path, 8)
    for voter in ("a", "b", "c"):
        study.vote(voter, "oooooooo")
    study.vote("fast but agreeing", "ooooooot", seconds=2.0)
    study.vote("slow but disagreeing", "tttttttt", seconds=30.0)
    study.vote("careless", "totttott", seconds=3.9)
    found = study.tally()
    assert found["dropped_voters"] == ["careless"]
    assert found["voters"]["careless"] == {"votes": 8, "disagreement": 0.75, "fast_share": 1.0, "dropped": True}
    assert found["voters"]["fast but agreeing"]["disagreement"] == 0.125
    assert found["votes"] == 40
    assert study.tally(rule=TallyConfig(fast_seconds=3.0))["dropped_voters"] == []
    assert study.tally(rule=TallyConfig(disagreement=0.8))["dropped_voters"] == []


def test_votes_that_do_not_belong_are_refused(tmp_path):
    study = Study(tmp_path, 2)
    study.vote("a", "oo")
    study.vote("a", "ot")
    with pytest.raises(DataError, match="voter a voted on task t0 twice: in .*0.json and .*1.json"):
        study.tally()
    study.files.pop()
    study.vote("b", "oo", study="other")
    with pytest.raises(DataError, match="votes on study other, but .*key.json is the key of study s"):
        study.tally()
    study.files.pop()
    vote = {"task": "t0", "realism": 3, "caption": 1, "seconds": 1}  # there is no third image
    for text in ("{", json.dumps({"study": "s", "page": "p", "voter": "w", "votes": [vote]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="bad.json is not a file of votes"):
            tally([tmp_path / "bad.json"], study.key)
    with pytest.raises(DataError, match="key.json is not a file of votes, .* saves: page: required, but not set"):
        tally([study.key], study.key)
    with pytest.raises(DataError, match="is not the key of a study"):
        tally(study.files, study.files[0])
