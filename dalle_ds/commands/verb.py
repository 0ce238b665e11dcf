"""A verb of the command line, built from a config class whose fields are options, recipe keys and KEY=VALUE words.

Precedence: defaults < the verb's section of the recipe < KEY=VALUE words and --set < positional inputs and options.
"""

import logging
import os
import re
import signal
import sys
import threading
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import click

from dalle_ds import project_files
from dalle_ds.commands.job import alone_or_on_all_ranks, on_all_ranks, prepare_process
from dalle_ds.console import Outcome, print_error, print_summary
from dalle_ds.errors import ConfigError, UserError, as_user_error
from dalle_ds.hints import close_words, did_you_mean
from dalle_ds.lazy import large_imports
from dalle_ds.places import check_store
from dalle_ds.redaction import redacted

log = logging.getLogger(__name__)

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)
RECIPE_SUFFIXES = (".yaml", ".yml")
TEXTS = (tuple[str, ...], tuple[Path, ...])
"""Types of list fields whose items may contain commas. The values of other list fields are split at commas."""
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@dataclass(frozen=True)
class Verb:
    """One row of the table of verbs: the inputs, options and function of `dalle-ds NAME`."""

    name: str
    """One or more words: "sample", "data encode"."""
    summary: str
    """One line, shown in the list of verbs."""
    config: str
    """Config class as "module:Class". Its fields are the options."""
    work: str
    """Function that does the work, as "module:function". It takes the config, and also the ranks unless `ranks` is "never".
    It returns its summary or an `Outcome`."""
    examples: tuple[str, ...]
    """Arguments that follow `dalle-ds NAME`, one string per example. If it starts with a launcher, it is a whole command."""
    text: str = ""
    """Text that --help shows after the summary."""
    inputs: tuple[str, ...] = ()
    """Fields that can be given by position, in this order. If the last field is a list, it takes all remaining inputs."""
    ranks: Literal["never", "maybe", "always"] = "never"
    """Whether a launcher may start the verb on several ranks. "maybe" creates a process group only if there are several ranks,
    "always" also for a single process."""
    has_options: bool = True
    """Whether the fields are options. If False, settings are given only by a recipe and KEY=VALUE words."""
    default_recipe: str | None = None
    """File in launchers/recipes that is read if no recipe is named."""
    takes_recipe: bool = True
    """Whether an argument that ends in .yaml is a recipe rather than an input."""
    ends: bool = True
    """Whether the verb finishes and prints a summary. A server does not."""

    @property
    def last_word(self) -> str:
        return self.name.rpartition(" ")[2]


def imported(name: str) -> Any:
    """Import the object that "module:object" names."""
    module, _, thing = name.partition(":")
    with large_imports():
        return getattr(import_module(module), thing)


class VerbCommand(click.Command):
    """The command of one verb. The config class is imported when the command is used: it needs pydantic, which would slow down
    `dalle-ds --help`."""

    def __init__(self, verb: Verb) -> None:
        super().__init__(verb.last_word, context_settings=CONTEXT, short_help=verb.summary, no_args_is_help=False)
        self.verb = verb

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*self._words(), *self._options(), *_common(self.verb), *super().get_params(ctx)]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        except click.NoSuchOption as error:
            known = [name for option in self.get_params(ctx) if isinstance(option, click.Option) for name in option.opts]
            ctx.fail(f"no such option {error.option_name}{did_you_mean(error.option_name, known)}")
        for option, n in Counter(given).items():
            if n > 1 and isinstance(option, click.Option) and not option.multiple and not option.is_flag:
                ctx.fail(f"{option.opts[0]} is given {n} times: expected once")
        return super().parse_args(ctx, args)

    def _words(self) -> list[click.Parameter]:
        return [click.Argument(["words"], nargs=-1, metavar=self._usage())]

    def _usage(self) -> str:
        inputs = [f"[{name.upper()}]" for name in self.verb.inputs]
        return " ".join([*inputs, *(["[RECIPE.yaml]"] if self.verb.takes_recipe else []), "[KEY=VALUE]..."])

    def _options(self) -> list[click.Parameter]:
        if not self.verb.has_options:
            return []
        from pydantic import BaseModel

        fields = imported(self.verb.config).model_fields
        return [
            _option(name, field)
            for name, field in fields.items()
            if not field.exclude and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        ]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        verb = self.verb
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(f"{verb.summary}\n\n{verb.text}".strip())
            if not verb.has_options:
                formatter.write_paragraph()
                formatter.write_text(f"`dalle-ds config {verb.name}` lists the settings. KEY=null unsets what a recipe sets.")
        with formatter.section("Examples"):
            for example in verb.examples:
                formatter.write(f"{'':>{formatter.current_indent}}{_typed(verb, example)}\n")

    def invoke(self, ctx: click.Context) -> None:
        verb, given = self.verb, dict(ctx.params)
        as_json, as_config = given.pop("json", False), given.pop("show_config")
        rank = os.environ.get("RANK", "0")
        try:
            if verb.ranks != "never":
                given.pop("local_rank")
                try:
                    prepare_process(given.pop("environment"))
                except ConfigError as error:  # any rank may be the only one with this error, so each prints it
                    print_error(f"error: {error}")
                    sys.exit(2)
                rank = os.environ.get("RANK", "0")
            from dalle_ds.recipes import RequiredKeys, check_outputs, dump_incomplete, dump_recipe, outputs_of

            try:
                config, default_recipe = self._config(given)
            except RequiredKeys as error:
                if not as_config:
                    raise
                click.echo(dump_incomplete(error.config_class, error.values), nl=False)
                return
            if as_config:
                click.echo(dump_recipe(config), nl=False)
                return
            if default_recipe is not None:
                if rank == "0":
                    log.info("no recipe named, using the default %s", default_recipe)
                if hasattr(config, "require_default_inputs"):
                    config.require_default_inputs(default_recipe)
            if hasattr(config, "check"):  # report a user error before ranks join, which takes time
                config.check()
            check_outputs(config)
            if rank == "0":  # of many ranks, one asks
                for _, _, url in outputs_of(config):
                    if str(url).startswith("s3://"):
                        from dalle_ds.storage.objects import check_writable

                        check_writable(url)
            if hasattr(config, "tracking") and (store := os.environ.get("MLFLOW_TRACKING_URI")):
                check_store(store)
            self._run(config, as_json)
        except (UserError, OSError) as error:
            said = as_user_error(error)
            if os.environ.get("DALLE_DS_TRACEBACK") == "1" or said is None:
                raise
            if rank == "0":  # every rank has the same error
                print_error(f"error: {said}")
            sys.exit(said.exit_code)

    def _config(self, given: dict[str, Any]) -> tuple[Any, Path | None]:
        """Returns the config, and the path of the default recipe if that was read (else None)."""
        verb, words = self.verb, given.pop("words")
        config_class = imported(verb.config)
        overrides = [*given.pop("set"), *(word for word in words if OVERRIDE.match(word))]
        _each_once(overrides, getattr(config_class, "section", None))
        recipe, inputs = given.pop("recipe", None), []
        for word in words:
            if OVERRIDE.match(word):
                continue
            if verb.takes_recipe and word.endswith(RECIPE_SUFFIXES):
                if recipe is not None:
                    raise ConfigError(f"found two recipes, {recipe} and {word}: expected one")
                recipe = word
            else:
                inputs.append(word)
        if (deepspeed_config := given.pop("deepspeed_config", None)) is not None:
            overrides.append(f"deepspeed_config={deepspeed_config}")
        by_position, values = _by_position(verb, inputs, config_class)
        overrides += by_position
        overrides += [f"{name}={value}" for name, value in given.items() if isinstance(value, str)]
        for name, value in given.items():
            if isinstance(value, str) and value.startswith("--"):
                raise ConfigError(f"--{name.replace('_', '-')} expects a value, found {value!r}")
            if isinstance(value, tuple) and value:
                is_text = config_class.model_fields[name].annotation in TEXTS
                values[name] = list(value) if is_text else [part for one in value for part in one.split(",")]
        values |= {name: value for name, value in given.items() if isinstance(value, bool)}
        is_default = recipe is None and verb.default_recipe is not None
        path = project_files.find(str(verb.default_recipe)) if is_default else _recipe(recipe)
        if hasattr(config_class, "from_command_line"):
            return config_class.from_command_line(path, overrides, values), None
        from dalle_ds.recipes import load_recipe

        return load_recipe(config_class, path, overrides, values), path if is_default else None

    def _run(self, config: Any, as_json: bool) -> None:
        verb = self.verb
        work = partial(imported(verb.work), config)
        if verb.ranks == "always":
            on_all_ranks(work, as_json)
        elif verb.ranks == "maybe":
            alone_or_on_all_ranks(work, as_json)
        else:
            with _sigterm_unwinds():
                result = work()
            finish(result, as_json)


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Within this context, SIGTERM raises SystemExit(143), so that temporary files are removed. Committed output stays."""

    def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(result: Mapping[str, Any] | Outcome | None, as_json: bool) -> None:
    """Print the outcome of a verb, then exit.

    Raises:
        SystemExit: code 0, or 1 if the outcome is not complete. If `result` is None, the function returns without exiting.
    """
    if result is None:
        return
    outcome = result if isinstance(result, Outcome) else Outcome(dict(result))
    for problem in outcome.problems:
        print_error(f"problem: {problem}")
    if outcome.text is not None:
        print(redacted(outcome.text), file=sys.stderr if as_json else sys.stdout, flush=True)
    if outcome.text is None or as_json:
        print_summary(outcome.summary, as_json)
    sys.exit(0 if outcome.is_complete else 1)


def _common(verb: Verb) -> list[click.Parameter]:
    recipe = click.Option(["--recipe"], metavar="FILE", help="YAML file with settings; the same as RECIPE.yaml")
    as_recipe = " as a recipe" if verb.takes_recipe else ""
    options: list[click.Parameter] = [
        *([recipe] if verb.takes_recipe else []),
        click.Option(["--set"], multiple=True, metavar="KEY=VALUE", help="override a setting; the same as KEY=VALUE"),
        click.Option(["--show-config"], is_flag=True, help=f"print the resulting settings{as_recipe} and exit"),
    ]
    if verb.ends:
        options.append(click.Option(["--json"], is_flag=True, help="print the summary as one JSON object on the last line"))
    if verb.ranks != "never":
        environment = "file of environment variables, one NAME=VALUE per line, for ranks that are started over ssh"
        options += [
            click.Option(["--environment"], type=click.Path(path_type=Path), metavar="FILE", help=environment),
            click.Option(["--local_rank"], hidden=True),  # added by the deepspeed launcher; LOCAL_RANK has the same value
        ]
    if verb.name == "train prior":
        options.append(
            click.Option(["--deepspeed_config"], metavar="JSON", help="DeepSpeed JSON file; the same as deepspeed_config=JSON")
        )
    return options


def _option(name: str, field: Any) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    default, description = field.default, field.description or ""
    if field.annotation is bool:
        help_text = f"{description} [default: {'yes' if default else 'no'}]"
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=help_text)
    if field.is_required():
        description += " [required]"
    elif default is not None and default != ():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        description += f" [default: {shown}]"
    is_list = typing.get_origin(field.annotation) in (tuple, list)
    return click.Option([flag, name], multiple=is_list, metavar=_metavar(field.annotation), help=description.strip())


def _metavar(annotation: Any) -> str:
    arms = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    for arm in arms:
        if typing.get_origin(arm) is typing.Literal:
            return "|".join(map(str, typing.get_args(arm)))
    kinds = {int: "N", float: "X", Path: "PATH"}
    return next((kinds[arm] for arm in arms if arm in kinds), "TEXT")


def _by_position(verb: Verb, inputs: Sequence[str], config_class: Any) -> tuple[list[str], dict[str, Any]]:
    names, overrides, left = list(verb.inputs), [], list(inputs)
    while left and names:
        name = names.pop(0)
        if not names and config_class.model_fields[name].annotation in TEXTS:
            return overrides, {name: left}
        overrides.append(f"{name}={left.pop(0)}")
    if left:
        kinds = "neither RECIPE.yaml nor KEY=VALUE" if verb.takes_recipe else f"not KEY=VALUE, and {verb.name} reads no recipe"
        names = " ".join(name.upper() for name in verb.inputs)
        wanted = f"at most {names}" if names else "no inputs"
        raise ConfigError(f"unexpected argument {left[0]!r}, {kinds}: expected {wanted}")
    return overrides, {}


def _each_once(overrides: Sequence[str], section: str | None) -> None:
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0].removeprefix(f"{section}.")
        if key in seen:
            raise ConfigError(f"{key} is given twice, as {seen[key]} and as {override}: expected once")
        seen[key] = override


def _recipe(name: str | None) -> Path | None:
    """The file in the working folder, else the shipped one of that name, so that recipes need no checkout."""
    if name is None:
        return None
    path = project_files.here_or_shipped(name)
    if not path.exists():
        shipped = [Path(known).name for known in project_files.names() if known.endswith(RECIPE_SUFFIXES)]
        hint = did_you_mean(Path(name).name, shipped).replace("?", ", which this package ships?")
        raise ConfigError(f"recipe {name} cannot be read: no such file{hint}")
    if path != Path(name):
        log.info("no %s in this folder: the recipe is %s", name, path)
    return path


def _typed(verb: Verb, example: str) -> str:
    """The full command line of an example. An example that starts with a launcher or a variable is already complete."""
    is_whole = example.split(" ")[0] in ("deepspeed", "torchrun", "RAY_ADDRESS=head:6379")
    return example if is_whole else f"dalle-ds {verb.name} {example}".rstrip()


class VerbGroup(click.Group):
    """The verbs that start with the same word, such as `data`. Each command is built when it is used."""

    def __init__(self, name: str | None, verbs: Sequence[Verb], help: str, helps: Mapping[str, str]) -> None:
        super().__init__(name, help=help, context_settings=CONTEXT, no_args_is_help=True)
        self._path = "" if name in (None, "dalle-ds") else f"{name} "
        self._verbs, self._helps = verbs, helps

    def list_commands(self, ctx: click.Context) -> list[str]:
        words = [verb.name.removeprefix(self._path).split()[0] for verb in self._verbs if verb.name.startswith(self._path)]
        return list(dict.fromkeys(words))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            own = [f"{self._path}{word}" for word in close_words(name, self.list_commands(ctx))]
            elsewhere = [verb.name for verb in self._verbs if verb.last_word == name]
            meant = [f"`dalle-ds {found}`" for found in elsewhere or own]
            hint = f"; did you mean {' or '.join(meant)}?" if meant else f"; `{ctx.command_path} --help` lists the commands"
            ctx.fail(f"no such command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        path = f"{self._path}{cmd_name}"
        for verb in self._verbs:
            if verb.name == path:
                return VerbCommand(verb)
            if verb.name.startswith(f"{path} "):
                return VerbGroup(path, self._verbs, self._helps[path], self._helps)
        return None
