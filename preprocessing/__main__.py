"""`python -m preprocessing VERB`: the table of verbs, no logic."""

import importlib
import signal
from types import FrameType
from typing import Annotated, NoReturn

import typer

from dalle_ds.console import TYPER_SETTINGS, print_error, print_summary, setup_logging, user_errors_exit
from dalle_ds.recipes import load_recipe
from preprocessing.executors.engine import Engine

app = typer.Typer(
    help="From raw pictures with captions to token shards. Every verb can be killed and started again.",
    no_args_is_help=True,
    **TYPER_SETTINGS,
)

RecipeOption = Annotated[str | None, typer.Option("--recipe", metavar="FILE", help="YAML file with the verb's section.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be repeated.")]
EngineOption = Annotated[Engine | None, typer.Option("--engine", help="Processes of this machine, or actors of a Ray cluster.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The summary as one JSON object on the last line of stdout.")]


@app.command()
def fetch(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Fetch the demo pictures, with captions, into a folder.

    \b
    python -m preprocessing fetch --set fetch.out=runs/demo/pictures
    python -m preprocessing fetch --set fetch.out=/tmp/shapes --set fetch.source=drawn
    """
    _run("fetch", recipe, set_, json)


@app.command()
def ingest(recipe: RecipeOption = None, set_: SetOption = None, engine: EngineOption = None, json: JsonOption = False) -> None:
    """Turn a folder of pictures with captions into raw shards.

    \b
    python -m preprocessing ingest --recipe launchers/recipes/tiny_ingest.yaml
    python -m preprocessing ingest --set ingest.pictures=/data/photos --set ingest.out=s3://bucket/raw --json
    """
    _run("ingest", recipe, [*(set_ or ()), *([f"ingest.engine={engine}"] if engine else ())], json)


@app.command()
def duplicates(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Leave out pictures of raw shards that look like an earlier one, or like one of an evaluation set.

    \b
    python -m preprocessing duplicates --set duplicates.raw=runs/photos/raw
    python -m preprocessing duplicates --set duplicates.raw=s3://b/raw --set 'duplicates.against=[s3://b/coco-validation]'
    """
    _run("duplicates", recipe, set_, json)


@app.command()
def tokenizer(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Train the BPE tokenizer on the captions of the train split.

    \b
    python -m preprocessing tokenizer --recipe launchers/recipes/tiny_tokenizer.yaml
    python -m preprocessing tokenizer --set tokenizer.raw=s3://bucket/raw --set tokenizer.out=s3://bucket/tokenizer.model
    """
    _run("tokenizer", recipe, set_, json)


@app.command()
def encode(recipe: RecipeOption = None, set_: SetOption = None, engine: EngineOption = None, json: JsonOption = False) -> None:
    """Encode raw shards with the dVAE into a token data set.

    \b
    python -m preprocessing encode --recipe launchers/recipes/tiny_encode.yaml
    python -m preprocessing encode --recipe launchers/recipes/tiny_encode.yaml --set encode.out=s3://bucket/tokens
    RAY_ADDRESS=head:6379 python -m preprocessing encode --recipe encode.yaml --engine ray
    """
    _run("encode", recipe, [*(set_ or ()), *([f"encode.engine={engine}"] if engine else ())], json)


@app.command()
def status(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """How far an ingest or encode is: shards done, open and failed, with the reasons; rate and time left.

    \b
    python -m preprocessing status --set status.root=s3://bucket/tokens
    python -m preprocessing status --set status.root=runs/demo/raw --json
    """
    _run("status", recipe, set_, json)


@app.command()
def verify(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Read everything back: checksums, counts, fingerprints. Exit code 1 if anything is wrong.

    \b
    python -m preprocessing verify --set verify.root=runs/demo/tokens
    python -m preprocessing verify --set verify.root=s3://bucket/tokens --set verify.delete_orphans=true
    """
    _run("verify", recipe, set_, json)


@app.command()
def stats(recipe: RecipeOption = None, set_: SetOption = None, json: JsonOption = False) -> None:
    """Counts, reasons of drops, code usage, caption lengths, bytes a sample, from the manifests; and a page of it.

    \b
    python -m preprocessing stats --set stats.root=runs/demo/tokens
    python -m preprocessing stats --set stats.root=s3://bucket/tokens --json
    """
    _run("stats", recipe, set_, json)


@app.command()
@user_errors_exit
def plan(
    pairs: Annotated[float, typer.Option(help="Raw pairs.")] = 250e6,
    measured: Annotated[str | None, typer.Option(metavar="OUT", help="A finished encode: its manifests tell figures.")] = None,
    rate: Annotated[float | None, typer.Option(help="Pictures/s of one worker.")] = None,
    gpu_rate: Annotated[float | None, typer.Option(help="Pictures/s of one GPU.")] = None,
    raw_bytes: Annotated[float | None, typer.Option(help="Bytes of a raw pair.")] = None,
    accepted: Annotated[float | None, typer.Option(help="Share of pairs that become samples.")] = None,
    shard_samples: Annotated[int, typer.Option(help="Pairs of a shard.")] = 10_000,
    workers: Annotated[int, typer.Option(help="At the same time, for the days.")] = 64,
    price: Annotated[float | None, typer.Option(help="Of an hour of a GPU, or without --gpu-rate of a worker.")] = None,
    json: JsonOption = False,
) -> None:
    """Shards, bytes, worker hours, GPU hours and cost of so many pairs; the summary says which figure was measured.

    \b
    python -m preprocessing plan --pairs 250e6 --measured runs/demo/tokens
    python -m preprocessing plan --pairs 250e6 --gpu-rate 500 --raw-bytes 40e3 --accepted 0.8 --price 2.5 --json
    """
    from preprocessing.stages.plan import run

    outcome = run(
        pairs,
        measured=measured,
        rate=rate,
        gpu_rate=gpu_rate,
        raw_bytes=raw_bytes,
        accepted=accepted,
        shard_samples=shard_samples,
        workers=workers,
        price=price,
    )
    print_summary(outcome.summary, json)


@user_errors_exit
def _run(verb: str, recipe: str | None, overrides: list[str] | None, as_json: bool) -> NoReturn:
    setup_logging()
    _catch_sigterm()
    stage = importlib.import_module(f"preprocessing.stages.{verb}")  # only now: --help need not wait for torch
    config = load_recipe(stage.Recipe, recipe, overrides or ())
    outcome = stage.run(getattr(config, verb))
    for problem in outcome.problems:
        print_error(f"problem: {problem}")
    print_summary(outcome.summary, as_json)
    raise SystemExit(0 if outcome.is_complete else 1)


def _catch_sigterm() -> None:
    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(143)  # unwinds, so that temporary files go; what is committed stays

    signal.signal(signal.SIGTERM, leave)


if __name__ == "__main__":
    app(prog_name="python -m preprocessing")
