"""Recipes: the settings of a run are a tree of frozen configs. Precedence: defaults < recipe file < `a.b=c`."""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dalle_ds.errors import ConfigError


class Config(BaseModel):
    """Base class of every config: frozen, validated on creation, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=BaseModel)

VALIDATION_FRACTION = 0.0024
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
)
"""Top-level keys of a recipe file: one section per verb of the command line."""

SHARED = {
    "validation_fraction": {
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
    tree = _section_of(_read_yaml(Path(path)), path, config_class) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r}: expected KEY=VALUE, for example optimizer.lr=1e-3")
        key = key.removeprefix(f"{section_of(config_class)}.")  # messages name keys with their section
        _put(tree, key, _parsed(text, _annotation_of(config_class, key.split("."))), override)
    for key, value in (values or {}).items():
        _put(tree, key, value, f"{key}={value}")
    return from_values(config_class, tree, "the command line" if path is None else f"recipe {path} with the command line")


def from_values(config_class: type[C], values: Mapping[str, Any], source: str) -> C:
    """Validate `values` as a config, without parsing text. Raises ConfigError, which names `source`, as `load_recipe`."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain(config_class, problem)}" for problem in error.errors()]
        raise ConfigError(f"{source} does not fit {config_class.__name__}:\n" + "\n".join(lines)) from None


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
    """Write a config as YAML, in its section. Loading the text gives an equal config."""
    tree, section = config.model_dump(mode="json"), section_of(type(config))
    return yaml.safe_dump(tree if section is None else {section: tree}, sort_keys=False, allow_unicode=True)


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} contains a {type(tree).__name__}, expected a mapping of keys")
    return tree


def _section_of(tree: dict[str, Any], path: str | Path | None, config_class: type[BaseModel]) -> dict[str, Any]:
    section = section_of(config_class)
    if section is None:
        return tree
    unknown = sorted(tree.keys() - SECTIONS - SHARED.keys())
    if unknown:
        raise ConfigError(
            f"recipe {path}: unknown section {unknown[0]!r}; settings belong under the name of their section, such as "
            f"{section!r}; known: {', '.join([*SECTIONS, *SHARED])}"
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


def _annotation_of(config_class: type[BaseModel] | None, keys: Sequence[str]) -> Any:
    """Returns the type annotation of the field at path `keys`, or None if there is no such field."""
    field = config_class.model_fields.get(keys[0]) if config_class is not None else None
    if field is None:
        return None
    return field.annotation if len(keys) == 1 else _annotation_of(_config_in(field.annotation), keys[1:])


def _parsed(text: str, annotation: Any) -> Any:
    arms = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
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
        except ValueError:
            continue
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _explain(config_class: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "(root)"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(config_class, problem["loc"][:-1])
        return f"unknown key {location!r} = {problem['input']!r}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{location}: required, but not set"
    if not problem["loc"]:  # a check of several fields together
        return problem["msg"]
    return f"{location} = {problem['input']!r}: {problem['msg']}"


def _known_keys(config_class: type[BaseModel], parents: tuple[Any, ...]) -> list[str]:
    for parent in parents:
        field = config_class.model_fields.get(str(parent))
        found = _config_in(field.annotation) if field else None
        if found is None:
            return ["?"]
        config_class = found
    return sorted(config_class.model_fields)


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, (_config_in(arm) for arm in typing.get_args(annotation))), None)
    return None
