"""`dalle-ds VERB`: a table of verbs, no logic. What a verb needs is imported when it runs, so that --help is quick."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle_ds.commands.bench import bench
from dalle_ds.commands.human_eval import human_eval
from dalle_ds.commands.job import alone_or_on_all_ranks, prepare_process
from dalle_ds.commands.options import ConfigCommand, Json
from dalle_ds.console import TYPER_SETTINGS, print_summary, setup_logging, user_errors_exit
from dalle_ds.storage.names import DVAE_FILE

app = typer.Typer(
    name="dalle-ds",
    help="Train and use the original DALL-E: dVAE, sparse-transformer prior, sampling. `dalle-ds VERB --help` has examples.",
    no_args_is_help=True,
    **TYPER_SETTINGS,
)

app.add_typer(bench)
app.add_typer(human_eval)

Recipe = Annotated[Path | None, typer.Option(help="YAML file of the run's settings.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one setting; may be repeated.")]
ExportFolder = Annotated[str, typer.Option("--export", help="Export folder: a path or s3:// url.")]
DataRoot = Annotated[str | None, typer.Option("--data", help="Token data set; unset: the one that the export names.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Environment = Annotated[Path | None, typer.Option(help="Of ranks on hosts that ssh reaches: variables, NAME=VALUE a line.")]


@app.command("train-dvae")
def train_dvae(recipe: Recipe = None, overrides: Overrides = None, environment: Environment = None, json: Json = False) -> None:
    """Train the discrete VAE, or go on with it where its folder has a checkpoint; alone, or on all ranks of a launcher.

    \b
    Examples:
      dalle-ds train-dvae --recipe launchers/recipes/tiny_dvae.yaml
      dalle-ds train-dvae --recipe launchers/recipes/tiny_dvae.yaml --set updates=500 --set folder=/data/dvae --json
      deepspeed --hostfile hosts --no_local_rank --module dalle_ds.cli train-dvae --recipe launchers/recipes/dvae.yaml
      torchrun --nproc_per_node 8 -m dalle_ds.cli train-dvae --recipe launchers/recipes/dvae.yaml
    """
    prepare_process(environment)
    from dalle_ds.recipes import load_recipe
    from dalle_ds.training.dvae.config import DVAERun
    from dalle_ds.training.dvae.trainer import train_dvae as run

    alone_or_on_all_ranks(lambda ranks: run(load_recipe(DVAERun, recipe, overrides or ()), ranks), json)


@app.command("train-clip")
def train_clip(recipe: Recipe = None, overrides: Overrides = None, json: Json = False) -> None:
    """Train a small CLIP that scores samples, or go on with it where its folder has a checkpoint; `sample --clip` takes it.

    \b
    Examples:
      dalle-ds train-clip --recipe launchers/recipes/tiny_clip.yaml
      dalle-ds train-clip --recipe launchers/recipes/tiny_clip.yaml --set data.raw=s3://bucket/raw --set updates=5000 --json
    """
    from dalle_ds.recipes import load_recipe
    from dalle_ds.training.clip.config import ClipRun

    settings = load_recipe(ClipRun, recipe, overrides or ())
    from dalle_ds.training.clip.trainer import train_clip as run

    print_summary(run(settings), json)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="Folder of a prior's training run, or the s3:// url of its checkpoints.")],
    out: Annotated[str, typer.Option(help="Folder for the export: a path or s3:// url.")],
    tag: Annotated[str | None, typer.Option(help="Checkpoint to take, e.g. update_00000500; unset: the newest.")] = None,
    averaged: Annotated[bool, typer.Option(help="Take the averaged weights, or the last ones.")] = True,
    max_file_gb: Annotated[float, typer.Option(min=0, help="A model above this becomes several files with an index.")] = 5.0,
    json: Json = False,
) -> None:
    """Write a checkpoint as one folder that samples without deepspeed; a few tensors are in memory at a time.

    \b
    Examples:
      dalle-ds export --run runs/prior --out runs/export
      dalle-ds export --run runs/prior --out s3://models/dalle --no-averaged --json
      dalle-ds export --run runs/12b --out /data/export --max-file-gb 2
    """
    from dalle_ds.training.prior.export import export_checkpoint

    max_file_bytes = int(max_file_gb * 10**9)
    print_summary(export_checkpoint(run, out, tag=tag, averaged=averaged, max_file_bytes=max_file_bytes), json)


@app.command()
def register(
    export: ExportFolder,
    name: Annotated[str, typer.Option(help="Of the registered model; one that exists gets a new version.")],
    clip: Annotated[str | None, typer.Option(help="Folder of a CLIP that goes with it and chooses: keep below n.")] = None,
    mlflow_uri: Annotated[str | None, typer.Option(help="MLflow store; unset: the one that the export names.")] = None,
    json: Json = False,
) -> None:
    """Make an export a registered MLflow model: captions in, pictures out, in any process that has its requirements.

    \b
    Examples:
      dalle-ds register --export runs/export --name dalle
      dalle-ds register --export s3://models/dalle --name dalle --clip runs/clip --mlflow-uri http://127.0.0.1:5000 --json
    """
    from dalle_ds.commands.register import register_export

    print_summary(register_export(export, name, clip=clip, uri=mlflow_uri), json)


@app.command("import-openai")
def import_openai(
    encoder: Annotated[str, typer.Option(help="OpenAI's encoder.pkl; a path or s3:// url.")],
    decoder: Annotated[str, typer.Option(help="OpenAI's decoder.pkl.")],
    out: Annotated[str, typer.Option(help="Weights file to write.")] = DVAE_FILE,
    image_size: Annotated[int, typer.Option(help="Pixels a side of the pictures that it will encode.")] = 256,
    json: Json = False,
) -> None:
    """Take the dVAE that OpenAI released; no code in its files runs, and its package is not needed.

    \b
    Examples:
      dalle-ds import-openai --encoder encoder.pkl --decoder decoder.pkl
      dalle-ds import-openai --encoder encoder.pkl --decoder decoder.pkl --out s3://bucket/dvae.safetensors --json
    """
    from dalle_ds.pretrained.openai_dvae import import_openai as take

    print_summary(take(encoder, decoder, out, image_size), json)


@app.command()
def sample(
    export: ExportFolder,
    caption: Annotated[list[str] | None, typer.Option(help="A caption; may be repeated.")] = None,
    captions: Annotated[Path | None, typer.Option(help="File with one caption a line; - reads standard input.")] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Take this many captions of the validation split, one a group.")] = 0,
    image: Annotated[Path | None, typer.Option(help="A picture whose top rows every sample begins with.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of its grid that are kept; unset: 15 of 32, as the paper.")] = None,
    repeat: Annotated[Path | None, typer.Option(help="Draw the pictures of this samples.json again, bit for bit.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Candidates for each caption; launchers let only -n through.")] = 4,
    keep: Annotated[int | None, typer.Option(help="Keep so many of them, the best by --clip; unset: all.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP that scores: a folder or hub name of `transformers`.")] = None,
    temperature: Annotated[float, typer.Option(help="1 as in the paper; lower is plainer; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this probability in sum; 1 keeps all.")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance, for priors trained with dropped captions.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Other seeds draw other pictures.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 32,
    data: DataRoot = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, grid.png, samples.json.")] = Path("samples"),
    device: Device = "auto",
    environment: Environment = None,
    json: Json = False,
) -> None:
    """Draw pictures for captions, alone or on all ranks of a launcher; needs no deepspeed when alone.

    A stopped run goes on with the same command. With --clip the best come first; the paper keeps the best of 512. With --image
    and no caption it draws variations of the picture from the row on that --rows says.

    \b
    Examples:
      dalle-ds sample --export runs/export --caption "a red apple" --caption "a blue house" --n 8
      dalle-ds sample --export s3://models/dalle --captions captions.txt --n 512 --keep 8 --clip openai/clip-vit-base-patch32
      dalle-ds sample --export runs/export --captions - --n 16 --keep 4 --clip runs/clip --out pictures < captions.txt
      dalle-ds sample --export runs/export --image cat.png --rows 15 --caption "the same cat as a sketch on the bottom"
      dalle-ds sample --export runs/export --held-out 8 --n 4 --seed 1 --json
      dalle-ds sample --export runs/export --repeat pictures/samples.json --out again
      deepspeed --no_local_rank --module dalle_ds.cli sample --export runs/export --captions captions.txt -n 512
      torchrun --nproc_per_node 8 -m dalle_ds.cli sample --export runs/export --captions captions.txt -n 512
    """
    prepare_process(environment)
    from dalle_ds.commands.sample import repeat_export, sample_export
    from dalle_ds.recipes import from_options
    from dalle_ds.sampling.captions import SampleSource
    from dalle_ds.sampling.request import SampleSettings

    if repeat is not None:
        print_summary(repeat_export(export, repeat, out, device=device), json)
        return
    limits = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    settings = from_options(SampleSettings, {"n": n, "keep": keep, "seed": seed, "batch": batch, **limits})
    source = SampleSource(caption or (), captions, held_out, data, image, rows)
    alone_or_on_all_ranks(
        lambda ranks: sample_export(export, out, settings, source, clip=clip, device=device, ranks=ranks), json
    )


@app.command()
def judge(
    chosen: Annotated[Path, typer.Argument(help="samples.json whose scores choose.")],
    judged: Annotated[Path, typer.Argument(help="samples.json of the same candidates, scored by another model.")],
    json: Json = False,
) -> None:
    """Does reranking help? The favourites of one scorer against random candidates, judged by another scorer.

    \b
    Examples:
      dalle-ds judge by_a/samples.json by_b/samples.json
      dalle-ds judge by_a/samples.json by_b/samples.json --json
    """
    from dalle_ds.evaluation.judge import judge as compare

    print_summary(compare(chosen, judged), json)


@app.command()
def serve(
    export: ExportFolder,
    clip: Annotated[str | None, typer.Option(help="CLIP that chooses: a folder or hub name of `transformers`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    max_n: Annotated[int, typer.Option(help="Candidates that one request may ask for.")] = 64,
    max_caption: Annotated[int, typer.Option(help="Characters of a caption.")] = 500,
    max_upload_mb: Annotated[float, typer.Option(help="Megabytes of a picture.")] = 10,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more are turned away.")] = 100,
    mlflow_url: Annotated[str | None, typer.Option(help="MLflow server, for the link to the training run.")] = None,
    device: Device = "auto",
) -> None:
    """A page: caption in, the best pictures out, row by row while they are drawn; and pictures drawn on from their top rows.

    \b
    Examples:
      dalle-ds serve --export runs/export --clip runs/clip
      dalle-ds serve --export s3://models/dalle --host 0.0.0.0 --port 8080 --max-n 16
    """
    from dalle_ds.commands.serve import PageLimits, serve_export
    from dalle_ds.recipes import from_options

    sizes = {"n": max_n, "caption": max_caption, "upload_mb": max_upload_mb, "waiting": max_waiting}
    limits = from_options(PageLimits, sizes)
    serve_export(export, limits, clip=clip, host=host, port=port, mlflow_url=mlflow_url, device=device)


@app.command()
def evaluate(
    export: ExportFolder,
    data: DataRoot = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Held-out samples at most; unset: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffled captions and of the confidence interval.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for evaluate.json, losses and charts.")] = Path("evaluation"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Held-out image loss with the right captions and with shuffled ones, in nats an image token.

    \b
    Examples:
      dalle-ds evaluate --export runs/export
      dalle-ds evaluate --export runs/export --data s3://bucket/tokens --limit 2000 --json
    """
    from dalle_ds.commands.evaluate import evaluate_export

    options: dict[str, Any] = {"data_url": data, "limit": limit, "seed": seed, "batch": batch, "device": device}
    print_summary(evaluate_export(export, out, **options), json)


@app.command("evaluate-images")
def evaluate_images(
    pictures: Annotated[str, typer.Option(help="samples.json or its folder, raw shards, or a folder of pictures.")],
    reference: Annotated[list[str] | None, typer.Option(help="Real ones, likewise; or .npz statistics, one a radius.")] = None,
    extractor: Annotated[str | None, typer.Option(help="inception or clip:PATH: features for FID, Inception Score.")] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="torch-fidelity's weights file; never downloaded.")] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP folder: also score pictures against their captions.")] = None,
    blur: Annotated[list[float] | None, typer.Option(min=0, help="Radius, repeatable; unset: 0, 1, 2, 4, 8.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels a side of both; unset: of the first picture.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Pictures of each side at most; the paper takes 30,000.")] = None,
    held_out: Annotated[float | None, typer.Option(min=0, max=1, help="Only this held-out share of raw shards.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the reference's statistics.")] = None,
    resamples: Annotated[int, typer.Option(min=2, help="For FID's interval; one takes seconds at 30,000.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of splits and intervals.")] = 0,
    export: Annotated[str | None, typer.Option(help="Export that drew them: its MLflow run gets scores and chart.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for image_metrics.json and its chart.")] = Path("image_metrics"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """FID, Inception Score and CLIP score of pictures, with the paper's blur on both sides and 95 % intervals.

    \b
    Examples:
      dalle-ds evaluate-images --pictures samples --reference coco/val --extractor inception --inception-weights w.pth --cache c
      dalle-ds evaluate-images --pictures samples --reference raw --held-out 0.05 --extractor clip:clip-folder --blur 0
      dalle-ds evaluate-images --pictures samples/samples.json --clip clip-folder --export runs/export --json
    """
    from dalle_ds.commands import evaluate_images as image_metrics
    from dalle_ds.ops.devices import resolve_device
    from dalle_ds.pretrained.clip import Clip

    device, load = str(resolve_device(device)), image_metrics.load_extractor
    options: dict[str, Any] = {
        "reference": reference or (),
        "extractor": load(extractor, inception_weights=inception_weights, device=device) if extractor else None,
        "clip": Clip.load(clip, device) if clip else None,
        "radii": blur or image_metrics.PAPER_RADII,
        "size": size,
        "limit": limit,
        "held_out": held_out,
        "cache": cache,
        "n_resamples": resamples,
        "batch": batch,
        "seed": seed,
        "export": export,
    }
    print_summary(image_metrics.evaluate_images(pictures, out, **options), json)


class _PlanCommand(ConfigCommand):
    config = "dalle_ds.planning.settings:PlanSettings"


@app.command(cls=_PlanCommand)
def plan(
    options: typer.Context,
    preset: Annotated[str | None, typer.Option(help="tiny, 0.3b, 1.2b, 2.8b, 5.6b, 12b; unset: the recipe's or 12b.")] = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Memory, communication, time and cost of training a prior, on paper: computed estimates, nothing is measured.

    A micro-step takes the longest of compute, links inside nodes, links between nodes and Python; `binds` says which. What the
    figures rest on, and how far the same arithmetic is from runs that others published: dalle_ds/planning/README.md. With
    --recipe, what the recipe and its DeepSpeed JSON say goes before the defaults here, and options before both.

    \b
    Examples:
      dalle-ds plan --preset 12b --gpus 256 --machine H100 --shard-gpus 8 --compression power_sgd --price 2.5 --json
      dalle-ds plan --recipe launchers/recipes/1.2b.yaml --gpus 8 --machine A100-40 --pcie
    """
    from dalle_ds.commands.plan import run

    print_summary(run(preset, recipe, overrides or (), options.obj), json)


@app.command()
def doctor(
    url: Annotated[list[str] | None, typer.Option(help="A place that must take a write; may be repeated.")] = None,
    min_free_gib: Annotated[float, typer.Option(help="Disk that must be free here.")] = 2.0,
    mlflow_uri: Annotated[str | None, typer.Option(help="MLflow store; unset: MLFLOW_TRACKING_URI, else local files.")] = None,
    json: Json = False,
) -> None:
    """Preflight: versions, accelerator, disk, storage, MLflow, fonts. Exit code 1 where what training needs is missing.

    \b
    Examples:
      dalle-ds doctor
      dalle-ds doctor --url s3://bucket/tokens --url /data/runs --min-free-gib 100 --json
    """
    from dalle_ds.commands.doctor import examine, print_findings, summary

    findings = examine(url or (), min_free_gib=min_free_gib, mlflow_uri=mlflow_uri)
    outcome = summary(findings)
    print_findings(findings)
    print_summary(outcome if json else {key: outcome[key] for key in ("ok", "failed", "warnings")}, json)
    raise typer.Exit(0 if outcome["ok"] else 1)


@app.command()
def accept(
    out: Annotated[Path, typer.Option(help="Folder for acceptance.json and the steps' output.")] = Path("acceptance"),
    rehearse: Annotated[bool, typer.Option(help="Every step small, on the CPU: no GPU is touched.")] = False,
    steps: Annotated[str, typer.Option(help="Names with commas; unset: all.")] = "",
    again: Annotated[str, typer.Option(help="Steps to repeat although they have ended, with commas, or all.")] = "",
    minutes: Annotated[float, typer.Option(min=0.01, help="For the steps of this call together.")] = 10.0,
    json: Json = False,
) -> None:
    """Try all that a GPU does differently, in ten minutes: numbers, speed, memory; a table of measured, expected, verdict.

    The first thing to run on a new GPU node. Each step is a process with a limit; one that fails, crashes or hangs is told
    with the end of its output, and the others run. A run that was stopped goes on with the same command. Exit code 1 where
    something is wrong; what is only slower or larger than expected is said, and passes.

    \b
    Examples:
      dalle-ds accept
      dalle-ds accept --steps environment,attention --again attention --json
      dalle-ds accept --rehearse --out runs/rehearsal --minutes 20
    """
    from dalle_ds.acceptance.report import table
    from dalle_ds.acceptance.run import accept as run

    names, repeated = ([name for name in value.split(",") if name] for value in (steps, again))
    summary = run(out, rehearse=rehearse, minutes=minutes, names=names, again=repeated)
    if json:
        print_summary(summary, json)
    else:
        print(table(summary), flush=True)
    raise typer.Exit(0 if summary["ok"] else 1)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A run's folder (it holds mlflow_run.json).")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow store than the run's.")] = None,
    json: Json = False,
) -> None:
    """Send what a run's spool still holds to MLflow, after an outage.

    \b
    Examples:
      dalle-ds replay runs/prior
      dalle-ds replay runs/prior --uri http://127.0.0.1:5000 --json
    """
    from dalle_ds.tracking.tracker import replay as run

    is_delivered = run(folder, uri=uri)
    print_summary({"folder": str(folder), "delivered": is_delivered}, json)
    raise typer.Exit(0 if is_delivered else 1)


@user_errors_exit
def main() -> None:
    """Entry point of the `dalle-ds` command."""
    setup_logging()
    app()


if __name__ == "__main__":
    main()
