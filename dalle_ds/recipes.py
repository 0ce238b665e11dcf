"""Recipes: a run is a tree of frozen configs, merged as defaults < recipe file < `--set a.b=c`."""

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
    """Base of every config: frozen, checked at birth, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=BaseModel)


def load_recipe(config_class: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Merge defaults, the YAML file at `path` and `overrides` ("a.b=c", YAML values) into one config.

    Raises:
        ConfigError: missing file, bad YAML, unknown key, wrong value; every problem is listed with its key.
    """
    tree = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(tree, override)
    return from_values(config_class, tree, f"recipe {path or 'the command line'}")


def from_values(config_class: type[C], values: Mapping[str, Any], source: str) -> C:
    """A config of values as they are. Raises ConfigError as `load_recipe`; it names `source`."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain(config_class, problem)}" for problem in error.errors()]
        raise ConfigError(f"{source} does not fit {config_class.__name__}:\n" + "\n".join(lines)) from None


def from_options(config_class: type[C], options: Mapping[str, Any]) -> C:
    """A config of single values, such as options of a command; None leaves a default. Raises ConfigError as `load_recipe`."""
    return load_recipe(config_class, overrides=[f"{key}={value}" for key, value in options.items() if value is not None])


def dump_recipe(config: BaseModel) -> str:
    """The merged tree as YAML: loading it again gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def canonical_json(tree: Any) -> str:
    """One spelling for equal trees: sorted keys, no spaces. Fingerprints hash this."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: the spelling of `--set` and of tracked parameters."""
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
        raise ConfigError(f"recipe {path} holds a {type(tree).__name__}, expected a mapping of keys")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, for example --set optimizer.lr=1e-3")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is the value {child!r}, not a section")
        node = child
    node[leaf] = _number_or_yaml(text)


def _number_or_yaml(text: str) -> Any:
    # YAML 1.1 reads 1e-3 as a string; people mean the number.
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
