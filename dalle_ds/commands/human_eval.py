"""`dalle-ds human-eval VERB`: the paper's human evaluation as commands."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_ds.commands.options import Json
from dalle_ds.console import TYPER_SETTINGS, print_summary

human_eval = typer.Typer(
    name="human-eval",
    help="The paper's human evaluation: pages to vote on, and the tally.",
    no_args_is_help=True,
    **TYPER_SETTINGS,
)


@human_eval.command("build")
def human_eval_build(
    ours: Annotated[str, typer.Option(help="Pictures with captions: samples.json or its folder, raw shards, or a folder.")],
    theirs: Annotated[str, typer.Option(help="The other side's, likewise; tasks are the captions that both have.")],
    out: Annotated[Path, typer.Option(help="Folder for page-*.html, and key.json, which voters must not see.")],
    limit: Annotated[int, typer.Option(min=1, help="Tasks at most; the paper has 1000.")] = 1000,
    per_page: Annotated[int, typer.Option(min=1, help="Tasks on one page.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the order and the sides.")] = 0,
    json: Json = False,
) -> None:
    """Make pages that ask of two pictures which is more realistic, and which matches the caption; they work offline.

    Give each page to five people. Each sends back the file that the page saves.

    \b
    Examples:
      dalle-ds human-eval build --ours samples --theirs other-model --out pages
      dalle-ds human-eval build --ours a/samples.json --theirs b/samples.json --out pages --limit 200 --per-page 50 --json
    """
    from dalle_ds.evaluation.human_page import build_pages

    print_summary(build_pages(ours, theirs, out, limit=limit, per_page=per_page, seed=seed), json)


@human_eval.command("tally")
def human_eval_tally(
    votes: Annotated[list[Path], typer.Argument(help="Files that voters saved.")],
    key: Annotated[Path, typer.Option(help="key.json of the pages.")],
    n_votes: Annotated[int, typer.Option("--votes", min=1, help="On each task, as wanted.")] = 5,
    fast_seconds: Annotated[float, typer.Option(min=0, help="An answer within these is fast; the paper's.")] = 4.0,
    fast_share: Annotated[float, typer.Option(min=0, max=1, help="Leave a worker out with more fast answers than this,")] = 0.5,
    disagreement: Annotated[float, typer.Option(min=0, max=1, help="and more against the others' majority than this.")] = 0.4,
    json: Json = False,
) -> None:
    """Count votes: the majority on each pair, shares with 95 % intervals, without workers who were fast and disagreed.

    \b
    Examples:
      dalle-ds human-eval tally votes/*.json --key pages/key.json
      dalle-ds human-eval tally votes/*.json --key pages/key.json --votes 3 --fast-seconds 2 --json
    """
    from dalle_ds.evaluation.human_votes import Rule, tally
    from dalle_ds.recipes import from_options

    rule = from_options(Rule, {"fast_seconds": fast_seconds, "fast_share": fast_share, "disagreement": disagreement})
    print_summary(tally(votes, key, n_votes=n_votes, rule=rule), json)
