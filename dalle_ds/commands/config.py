"""`dalle-ds config NAME`: list every setting of a verb with its type, default and description."""

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from dalle_ds.commands.settings import ConfigConfig
from dalle_ds.commands.verb import imported
from dalle_ds.commands.verbs import GROUPS, VERBS
from dalle_ds.console import Outcome
from dalle_ds.errors import ConfigError
from dalle_ds.hints import did_you_mean
from dalle_ds.recipe_errors import config_in
from dalle_ds.recipes import section_of


def run(config: ConfigConfig) -> Outcome:
    """List the settings of the verb that `config.name` names, or the verbs of a group, or all verbs if it names none.

    Raises:
        ConfigError: there is no such verb and no such group.
    """
    names = {verb.name: verb for verb in VERBS}
    wanted = " ".join(" ".join(config.name).replace(".", " ").split())
    verb = names.get(wanted) or names.get(f"train {wanted}") or names.get(f"data {wanted}")
    if verb is None:
        group = [name for name in names if not wanted or name.startswith(f"{wanted} ")]
        if not group:
            hint = did_you_mean(wanted, names)
            raise ConfigError(f"unknown verb {wanted!r}: expected one of {', '.join([*GROUPS, *names])}{hint}")
        sections = {name: section_of(imported(names[name].config)) for name in group}
        width = max(map(len, group))
        lines = [f"{name:<{width}}  {f'section {key}' if key else 'no section'} of a recipe" for name, key in sections.items()]
        return Outcome({"verbs": group, "sections": sections}, text="\n".join(lines))
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
        inner = config_in(field.annotation)
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
        item = config_in((typing.get_args(field.annotation) or (None,))[0])
        if item is not None and typing.get_origin(field.annotation) in (tuple, list):
            yield from _rows(item, f"{prefix}{name}[].")


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
        is_section = config_in(arguments[0]) is not None
        return "list of sections" if is_section else f"list of {_type_name(arguments[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
