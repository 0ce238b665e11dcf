"""Count the votes of the paper's human evaluation: majority of five votes per pair, without careless voters."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError
from scipy.stats import binomtest

from dalle_ds.errors import DataError
from dalle_ds.recipe_errors import explain_all
from dalle_ds.recipes import Config
from dalle_ds.storage.bounded import read_bounded
from dalle_ds.storage.text import parse_json

QUESTIONS: Final = ("realism", "caption")
OTHER: Final = {"ours": "theirs", "theirs": "ours"}


class TallyConfig(Config):
    """Thresholds for leaving out a voter. A voter's votes are left out if both fractions are exceeded.

    The paper (appendix F) left out one voter for disagreement and many answers within four seconds, and states no other
    numbers. The defaults are: more than 40 % of the answers on realism against the majority of the others (guessing gives 50
    %), and more than half of all tasks answered in less than four seconds.
    """

    fast_seconds: float = Field(4.0, ge=0, description="the paper's")
    fast_share: float = Field(0.5, ge=0, le=1)
    disagreement: float = Field(0.4, ge=0, le=1)


class Vote(Config):
    task: str
    realism: Literal[1, 2]
    caption: Literal[0, 1, 2]
    seconds: float = Field(ge=0)


class VoteFile(Config):
    study: str
    page: str
    voter: str = Field(min_length=1)
    votes: list[Vote]


@dataclass(frozen=True)
class Answer:
    """One voter's vote, with the sides resolved. Each answer is "ours" or "theirs"; on captions it can also be "neither"."""

    voter: str
    task: str
    seconds: float
    choice: dict[str, str]


def tally(vote_files: Sequence[Path], key_file: Path, *, n_votes: int = 5, rule: TallyConfig | None = None) -> dict[str, Any]:
    """Fraction of the tasks that each side wins, for each question, with 95 % Wilson intervals.

    The answer with the most votes wins a task. If two answers share the lead, the task is a tie: it counts for neither side,
    but stays in the total. Tasks with more or fewer than `n_votes` votes take part, and the summary states their number.

    Raises:
        DataError: an invalid file, a file of another study, no votes left, or two votes of one voter on one task.
    """
    rule = rule or TallyConfig()
    key = _read_key(key_file)
    answers = list(_read_answers(vote_files, key, key_file))
    voters = _judge_voters(answers, rule)
    dropped = sorted(voter for voter, found in voters.items() if found["dropped"])
    kept = [answer for answer in answers if answer.voter not in dropped]
    if not kept:
        raise DataError(f"no votes are left: {len(answers)} votes of {len(voters)} voters, dropped: {', '.join(dropped)}")
    by_task: dict[str, list[Answer]] = defaultdict(list)
    for answer in kept:
        by_task[answer.task].append(answer)
    outcome = {
        "study": key["study"],
        "tasks": len(key["tasks"]),
        "tasks_with_votes": len(by_task),
        "tasks_with_other_than_wanted_votes": sum(len(by_task.get(task["task"], ())) != n_votes for task in key["tasks"]),
        "votes": len(kept),
        "dropped_voters": dropped,
    }
    for question in QUESTIONS:
        winners = Counter(_majority(answer.choice[question] for answer in found) for found in by_task.values())
        for side in ("ours", "theirs", *(["neither"] if question == "caption" else []), "tie"):
            interval = binomtest(winners[side], len(by_task)).proportion_ci(method="wilson")
            name, bounds = f"{question}_{side}", {"low": interval.low, "high": interval.high}
            outcome[name] = winners[side] / len(by_task)
            outcome |= {f"{name}_{bound}": float(value) for bound, value in bounds.items()}
    return {**outcome, "rule": rule.model_dump(), "voters": voters}


def _judge_voters(answers: Sequence[Answer], rule: TallyConfig) -> dict[str, dict[str, Any]]:
    """For each voter: disagreement with the majority of the others on realism, fraction of fast answers, and the verdict."""
    by_task: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.task].append(answer)
    found: dict[str, dict[str, Any]] = {}
    for voter in sorted({answer.voter for answer in answers}):
        own = [answer for answer in answers if answer.voter == voter]
        others = [_majority(other.choice["realism"] for other in by_task[answer.task] if other is not answer) for answer in own]
        compared = [(answer.choice["realism"], other) for answer, other in zip(own, others, strict=True) if other != "tie"]
        disagreement = sum(mine != other for mine, other in compared) / len(compared) if compared else 0.0
        fast = sum(answer.seconds < rule.fast_seconds for answer in own) / len(own)
        is_dropped = disagreement > rule.disagreement and fast > rule.fast_share
        found[voter] = {"votes": len(own), "disagreement": disagreement, "fast_share": fast, "dropped": is_dropped}
    return found


def _majority(choices: Iterable[str]) -> str:
    """Returns the answer with the most votes. Returns "tie" if the lead is shared or there are no votes."""
    ranks = Counter(choices).most_common(2)
    return "tie" if not ranks or (len(ranks) == 2 and ranks[0][1] == ranks[1][1]) else ranks[0][0]


def _read_key(file: Path) -> dict[str, Any]:
    try:
        key = parse_json(read_bounded(file))
        lefts = {task["task"]: task["left"] for task in key["tasks"]}
        if not lefts or not set(lefts.values()) <= OTHER.keys():
            raise ValueError("it has no tasks with sides")
        return {"study": key["study"], "tasks": key["tasks"], "lefts": lefts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not the key of a study ({error}); `dalle-ds eval human build` writes key.json") from None


def _read_answers(vote_files: Sequence[Path], key: dict[str, Any], key_file: Path) -> Iterable[Answer]:
    seen: dict[tuple[str, str], Path] = {}
    for file in vote_files:
        try:
            found = VoteFile.model_validate_json(read_bounded(file))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}; expected a file of votes") from None
        except ValidationError as error:
            problem = explain_all(VoteFile, error.errors())[0]
            raise DataError(
                f"{file} is not a file of votes, which a page of `dalle-ds eval human build` saves: {problem}"
            ) from None
        if found.study != key["study"]:
            raise DataError(f"{file} has votes on study {found.study}, but {key_file} is the key of study {key['study']}")
        for vote in found.votes:
            if vote.task not in key["lefts"]:
                raise DataError(f"{file}: task {vote.task} is not in {key_file}")
            before = seen.get((found.voter, vote.task))
            if before is not None:
                raise DataError(f"voter {found.voter} voted on task {vote.task} twice: in {before} and {file}; leave one out")
            seen[found.voter, vote.task] = file
            left = key["lefts"][vote.task]
            sides = {0: "neither", 1: left, 2: OTHER[left]}
            choice = {"realism": sides[vote.realism], "caption": sides[vote.caption]}
            yield Answer(found.voter, vote.task, vote.seconds, choice)
