"""Recipes: the settings of a run are a tree of frozen configs. Precedence: defaults < recipe file < `a.b=c`."""

import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_jsonable_python

from dalle_ds.errors import ConfigError, UserError
from dalle_ds.hints import did_you_mean
from dalle_ds.places import check_local, check_output, check_place, check_store, check_text, expand_home
from dalle_ds.recipe_errors import annotation_of, arms_of, config_in, explain_all
from dalle_ds.recipe_yaml import parse_yaml, read_yaml
from dalle_ds.redaction import redacted


class Config(BaseModel):
    """Base class of every config: frozen, validated on creation, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _paths_are_local(cls, value: Any, info: ValidationInfo) -> Any:
        # before the value becomes a Path, which turns s3://bucket into s3:/bucket
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str | Path):
                _refusing(check_text, str(text))
        if isinstance(value, str | Path) and Path in arms_of(cls.model_fields[str(info.field_name)].annotation):
            _refusing(check_local, value)
            return Path(expand_home(str(value)))
        return value


C = TypeVar("C", bound=BaseModel)


def _refusing(check: Callable[[Any], None], value: Any) -> None:
    try:
        check(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def _checked(check: Callable[[Any], None], change: Callable[[str], str] = str) -> AfterValidator:
    def each(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return type(value)(map(each, value))
        changed = change(value)
        _refusing(check, changed)
        return changed

    return AfterValidator(each)


@dataclass(frozen=True)
class Output:
    """Marks a field that names an output. Commands check before their work that it can be created."""

    kind: Literal["folder", "file"]


_PLACE = _checked(check_place, expand_home)
Place = Annotated[str, _PLACE]
"""Type of a field that names an input: a path, file:// or s3://."""
OptionalPlace = Annotated[str | None, _PLACE]
Places = Annotated[tuple[str, ...], _PLACE]
OutFolder = Annotated[str, _PLACE, Output("folder")]
"""Type of a field that names an output. A local output has the type LocalOutFolder."""
OptionalOutFolder = Annotated[str | None, _PLACE, Output("folder")]
LocalOutFolder = Annotated[Path, Output("folder")]
OptionalLocalOutFolder = Annotated[Path | None, Output("folder")]
OutFile = Annotated[str, _PLACE, Output("file")]
OptionalOutFile = Annotated[str | None, _PLACE, Output("file")]
OptionalStore = Annotated[str | None, _checked(check_store)]
"""Type of a field that names an MLflow store."""


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Type of a field that seeds random numbers: numpy takes no negative seed, and torch none of more than 64 bits."""


class RequiredKeys(ConfigError):
    """Required settings are not set. Nothing else is wrong."""

    def __init__(self, message: str, config_class: type[BaseModel], values: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.config_class, self.values = config_class, values


VALIDATION_FRACTION = 0.002424
"""Default of every stage: the paper's validation split has 606,000 of 250 million pairs."""

DEVICE = "auto, cpu, cuda or cuda:N; auto: a GPU if there is one"
"""Description of every setting `device` that takes these values."""

SECTIONS = (
    "fetch",
    "ingest",
    "dedup",
    "tokenizer",
    "dvae",
    "encode",
    "prior",
    "clip",
    "status",
    "verify",
    "stats",
    "data_plan",
    "export",
    "import_dvae",
    "register",
    "sample",
    "serve",
    "loss",
    "images",
    "scenes",
    "rerank",
    "human_build",
    "human_tally",
    "plan",
    "doctor",
    "accept",
    "mlflow_sync",
    "diagnose",
    "bench_attention",
    "bench_resblock",
    "bench_step",
    "bench_scaling",
    "bench_underflow",
    "bench_sample",
    "bench_peers",
    "bench_encode",
    "bench_loader",
    "bench_cuda_path",
)
"""Top-level keys of a recipe file: one section per verb of the command line."""

SHARED = {
    "validation_fraction": {
        "fetch": "validation_fraction",
        "tokenizer": "validation_fraction",
        "encode": "validation_fraction",
        "dvae": "data.validation_fraction",
        "clip": "data.validation_fraction",
    }
}
"""Top-level keys shared by several sections, for settings that must agree. Maps each key to its name in each section."""


def load_recipe(
    config_class: type[C],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> C:
    """Merge defaults, the class's section of the YAML file at `path`, `overrides` ("a.b=c") and `values` into one config.

    If the field takes a string, the value of an override is its text as it is. Otherwise the text is parsed as a number or as
    YAML.

    Raises:
        ConfigError: missing file, invalid YAML, unknown section or key, or invalid value. The message lists every invalid key.
    """
    tree = _section_of(read_yaml(Path(path)), path, config_class) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: expected KEY=VALUE, for example {_example(config_class)}")
        key = key.removeprefix(f"{section_of(config_class)}.")  # messages name keys with their section
        _put(tree, key, _parsed(text, annotation_of(config_class, key.split("."))), override)
    for key, value in (values or {}).items():
        _put(tree, key, value, f"{key}={value}")
    return from_values(config_class, tree, "the command line" if path is None else f"recipe {path} with the command line")


def from_values(config_class: type[C], values: Mapping[str, Any], source: str, others: Sequence[str] = ()) -> C:
    """Validate `values` as a config, without parsing text.

    Args:
        source: what the message names as the origin of the values.
        others: keys that the caller takes itself. The message about an unknown key lists them too.

    Raises:
        ConfigError: as `load_recipe`. RequiredKeys if the only problem is that required keys are not set.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines = explain_all(config_class, problems, others)
        message = f"{source}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{source}:", *lines])
        if all(problem["type"] == "missing" for problem in problems):
            raise RequiredKeys(message, config_class, values) from None
        raise ConfigError(message) from None


def from_options(config_class: type[C], options: Mapping[str, Any]) -> C:
    """Build a config from single values, such as options of a command. None keeps the default.

    Raises:
        ConfigError: as `load_recipe`.
    """
    return load_recipe(config_class, overrides=[f"{key}={value}" for key, value in options.items() if value is not None])


def section_of(config_class: type[BaseModel]) -> str | None:
    """Returns the recipe section of a config class. None: its recipe file has no sections."""
    return getattr(config_class, "section", None)


def dump_recipe(config: BaseModel) -> str:
    """Write a config as YAML, in its section. Loading the text gives an equal config, but without the passwords of urls."""
    return _as_yaml(config.model_dump(mode="json"), section_of(type(config)))


def dump_incomplete(config_class: type[BaseModel], values: Mapping[str, Any]) -> str:
    """As `dump_recipe`, of values that lack required keys. These have no value, and a comment marks them."""
    tree, section = _merged(_defaults(config_class), values), section_of(config_class)
    return _as_yaml(tree, section).replace(_REQUIRED, "# required")


def _as_yaml(tree: Any, section: str | None) -> str:
    tree = _redacted(tree if section is None else {section: tree})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _redacted(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree


def check_outputs(config: BaseModel) -> None:
    """Check that the outputs which `config` names can be created. Raises ConfigError with the key of one that cannot."""
    for key, output, value in outputs_of(config):
        try:
            check_output(value, output.kind)
        except UserError as error:
            raise ConfigError(f"{key} = {str(value)!r}: {str(error).removeprefix(f'{value}: ')}") from None


def canonical_json(tree: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, so that equal trees give equal text. Fingerprints hash this text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"a": {"b": 1}} to {"a.b": 1}, the form of KEY=VALUE words and of tracked parameters."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys of two flat trees whose values differ, with both values. A key that is missing has None."""
    return [(key, before.get(key), now.get(key)) for key in dict.fromkeys([*now, *before]) if before.get(key) != now.get(key)]


_REQUIRED = "REQUIRED-KEY"


def _defaults(config_class: type[BaseModel]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        inner = config_in(field.annotation)
        if field.exclude:
            continue
        if field.is_required():
            tree[name] = _REQUIRED if inner is None else _defaults(inner)
        else:
            tree[name] = field.get_default(call_default_factory=True)
    return to_jsonable_python(tree)


def _merged(tree: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        below = tree.get(key)
        nested = isinstance(below, dict) and isinstance(value, Mapping)
        tree[key] = _merged(typing.cast(dict[str, Any], below), value) if nested else to_jsonable_python(value)
    return tree


def outputs_of(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Output, Any]]:
    """Yields (key, kind, value) of the outputs that a config names."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from outputs_of(value, f"{prefix}{name}.")
        for mark in field.metadata:
            if isinstance(mark, Output) and value is not None:
                yield f"{prefix}{name}", mark, value


def _section_of(tree: dict[str, Any], path: str | Path | None, config_class: type[BaseModel]) -> dict[str, Any]:
    section = section_of(config_class)
    if section is None:
        return tree
    unknown = sorted(tree.keys() - SECTIONS - SHARED.keys())
    if unknown:
        raise ConfigError(
            f"recipe {path}: unknown section {unknown[0]!r}; settings belong under the name of their section, such as "
            f"{section!r}; known: {', '.join([*SECTIONS, *SHARED])}{did_you_mean(unknown[0], [*SECTIONS, *SHARED])}"
        )
    own = tree.get(section) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"recipe {path}: section {section!r} contains a {type(own).__name__}, expected a mapping of keys")
    for key, places in SHARED.items():
        if key in tree and section in places:
            _put(own, places[section], tree[key], f"{key}={tree[key]}", replacing=False)
    return own


def _put(tree: dict[str, Any], key: str, value: Any, told: str, replacing: bool = True) -> None:
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{told!r}: {parent!r} is the value {child!r}, not a section")
        node = child
    if replacing or leaf not in node:
        node[leaf] = value


def _parsed(text: str, annotation: Any) -> Any:
    arms = arms_of(annotation)
    if type(None) in arms and text in ("null", "~"):
        return None
    if any(arm is str or arm is Path or _is_choice_of_strings(arm) for arm in arms) and not any(
        arm in (int, float, bool) for arm in arms
    ):
        return text
    if not text:  # for example an unset shell variable; YAML would read it as null
        return text
    value = _number_or_yaml(text)
    lists = [typing.get_args(arm) for arm in arms if typing.get_origin(arm) in (tuple, list)]
    if lists and not isinstance(value, list):
        return [text] if lists[0][0] is str else text.split(",")
    return value


def _is_choice_of_strings(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal and all(isinstance(one, str) for one in typing.get_args(annotation))


def _number_or_yaml(text: str) -> Any:
    # YAML 1.1 reads 1e-3 as a string, but users mean the number
    for number in (int, float):
        try:
            return number(text)
        except ValueError:  # not a number, or an integer of thousands of digits
            continue
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _example(config_class: type[BaseModel]) -> str:
    """KEY=VALUE with a key of the config: the first whose default is a number."""
    for name, field in config_class.model_fields.items():
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            return f"{name}={field.default}"
    return f"{next(iter(config_class.model_fields))}=VALUE"
