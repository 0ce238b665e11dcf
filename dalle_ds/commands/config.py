"""`dalle-ds config NAME`: list every setting of a verb with its type, default and description."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dalle_ds.commands.settings import ConfigConfig
from dalle_ds.commands.verb import imported
from dalle_ds.commands.verbs import VERBS
from dalle_ds.console import Outcome
from dalle_ds.errors import ConfigError


def run(config: ConfigConfig) -> Outcome:
    """List the settings of the verb `config.name`, or the verbs if it is None. Raises ConfigError if there is no such verb."""
    names = {verb.name.replace(" ", "."): verb for verb in VERBS}
    if config.name is None:
        return Outcome({"verbs": list(names)}, text="\n".join(names))
    verb = names.get(config.name) or names.get(f"train.{config.name}") or names.get(f"data.{config.name}")
    if verb is None:
        raise ConfigError(f"unknown verb {config.name!r}: expected one of {', '.join(names)}")
    rows = list(_rows(imported(verb.config)))
    widths = [max(len(row[column]) for row in rows) for column in ("key", "type", "default")]
    lines = [
        "  ".join(f"{row[column]:<{width}}" for column, width in zip(("key", "type", "default"), widths, strict=True))
        + f"  {row['description']}"
        for row in rows
    ]
    return Outcome({"verb": verb.name, "keys": rows}, text="\n".join(line.rstrip() for line in lines))


def _rows(config_class: type[BaseModel], prefix: str = "", section: Any = None) -> Iterator[dict[str, str]]:
    """Yield a row for each key of `config_class`, nested sections included.

    Args:
        prefix: dotted path of this section, with a trailing dot.
        section: default instance of `config_class` in the parent config, whose values are shown as the defaults. If None, the
            defaults of the class are shown.
    """
    for name, field in config_class.model_fields.items():
        if field.exclude:
            continue
        inner = next((arm for arm in _arms(field.annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)), None)
        by_class = None if field.is_required() else field.get_default(call_default_factory=True)
        value = by_class if section is None else getattr(section, name)
        if inner is not None:
            if value is None and not field.is_required():
                yield {"key": f"{prefix}{name}", "type": "section", "default": "null", "description": inner.__doc__ or ""}
            yield from _rows(inner, f"{prefix}{name}.", value)
            continue
        default = "required" if field.is_required() and section is None else _shown(value)
        yield {
            "key": f"{prefix}{name}",
            "type": _type_name(field.annotation),
            "default": default,
            "description": field.description or "",
        }


def _arms(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
