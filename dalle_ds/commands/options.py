"""Options that several commands have: --json, and those that are the fields of a config, each written once, there."""

import inspect
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Json = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object on the last line of stdout.")]

_KNOWN = (bool, int, float, str, int | None, float | None, str | None)


def option(name: str, annotation: Any, default: Any, description: str | None) -> inspect.Parameter:
    """A keyword parameter that typer reads as `--name`."""
    # what typer cannot read by itself, such as a choice or a list of numbers, is text: the config checks it
    known = annotation if annotation in _KNOWN else str
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    flag = f"--{name.replace('_', '-')}"
    annotated = Annotated[known, typer.Option(f"{flag}/--no-{flag[2:]}" if default is True else flag, help=description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated)


class ConfigCommand(TyperCommand):
    """A command that has, beside its function's own options, one for each field of a config. Those that are given stand in the
    context's `obj`, by field.

    The config is imported when the command is used: it needs pydantic, and `dalle-ds --help` should be quick.
    """

    config = "module:Class"

    def get_params(self, ctx: Any) -> list[Any]:
        return [*_options_of(self.config), *super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        given = {parameter.name: ctx.params.pop(parameter.name) for parameter in _options_of(self.config)}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return super().invoke(ctx)


def _options_of(config: str) -> list[Any]:
    module, _, name = config.partition(":")

    def function(**options: Any) -> None:
        pass

    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_unless_given(key, field) for key, field in getattr(import_module(module), name).model_fields.items()]
    )
    single = typer.Typer(add_completion=False)
    single.command()(function)
    return typer.main.get_command(single).params


def _unless_given(name: str, field: Any) -> inspect.Parameter:
    """None, so that what is not given can come from elsewhere; flags are false."""
    if field.annotation is bool:
        return option(name, bool, False, field.description)
    known = field.annotation if field.annotation in _KNOWN else str
    default = "" if field.default is None else f" ({field.default})"
    return option(name, known | None, None, f"{field.description}{default}")
