"""`dalle-ds bench NAME`: a table of benchmarks, whose options are the fields of their settings."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from dalle_ds.commands.options import option
from dalle_ds.console import TYPER_SETTINGS, print_summary

QUESTIONS = {
    "attention": "Attention alone against dense attention, masked and causal, each pattern and their mix.",
    "resblock": "One layer, forward and backward, against the same layer with dense attention.",
    "step": "A whole training step against the same step with dense attention; tokens a second, FLOP/s, MFU.",
    "scaling": "A gradient scale for every residual block against one loss scale: the fp16 training step.",
    "underflow": "What fp16 loses under one loss scale and under one for every residual block; numbers and a picture.",
    "sample": "Cached sampling against a dense key-value cache and against none.",
    "peers": "Training step and sampling against the package dalle-pytorch, where it is installed.",
    "encode": "The encode stage, from raw shard to committed token shard, against the bare encoder on ready pictures.",
    "loader": "The training stream against plain webdataset on the same shards; does a training loop wait for it?",
    "cuda-path": "What a layer gives a GPU to do, counted without one: kernels, bytes, host waits; and the host's time for it.",
}
EXAMPLES = {
    "attention": "--dtype bf16 --json",
    "resblock": "--heads 16 --batch 1 --dtype fp16",
    "step": "--layers 4 --dtype bf16 --peak-tflops 1.5",
    "scaling": "--layers 4 --rounds 21",
    "underflow": "--layers 64 --powers 0 --updates 100",
    "sample": "--layers 4 --batch 8 --positions 8,512,1000",
    "peers": "--layers 2 --json",
    "encode": "--small --raw runs/demo/raw --dvae runs/demo/dvae/dvae.safetensors",
    "loader": "--dataset runs/demo/tokens --batch 32 --text-len 64",
    "cuda-path": "--heads 62 --rounds 0 --json",
}


class _Benchmarks(TyperGroup):
    """Makes a command when it is asked for: settings need pydantic, and `dalle-ds --help` should be quick."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(QUESTIONS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in QUESTIONS:
            return None
        single = typer.Typer(**TYPER_SETTINGS)
        single.command(cmd_name)(_command(cmd_name))
        return typer.main.get_command(single)


bench = typer.Typer(
    name="bench",
    cls=_Benchmarks,
    help="Ours and the other side in turns on this machine. `dalle-ds bench NAME --help` has examples.",
    no_args_is_help=True,
    **TYPER_SETTINGS,
)


@bench.callback()
def _group() -> None:
    pass


def _command(name: str) -> Callable[..., None]:
    """A function whose parameters are the fields of the benchmark's settings, as typer reads them."""
    from dalle_ds.bench.harness import settings as classes
    from dalle_ds.recipes import from_options

    settings_class = getattr(classes, f"{name.title().replace('-', '')}Settings")

    def command(json: bool, **options: Any) -> None:
        # imported here: an error in the options needs no torch
        settings = from_options(settings_class, options)
        module = "preprocessing.bench" if name == "encode" else f"dalle_ds.bench.{name.replace('-', '_')}"
        report = import_module(module).run(settings)
        report.print_table(to_stderr=json)
        if json:
            print_summary(report.summary(), as_json=True)

    fields = settings_class.model_fields.items()
    parameters = [option(key, field.annotation, field.default, field.description) for key, field in fields]
    parameters.append(option("json", bool, False, "End with the summary as one JSON object on stdout."))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = f"{QUESTIONS[name]}\n\n\b\nExamples:\n  dalle-ds bench {name}\n  dalle-ds bench {name} {EXAMPLES[name]}\n"
    return command
