"""Explain what is wrong with the values of a config: which key, which value, what was expected, which key was meant."""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from dalle_ds.hints import close_words, did_you_mean

RENAMED: dict[str, str | tuple[str, ...]] = {
    "average": "ema",
    "averaged": "ema",
    "batch_size": ("global_batch", "batch"),
    "dataset": "data",
    "checkpoint_every": "checkpoint.every",
    "heads": "n_heads",
    "held_out": "validation",
    "image": "image_prompt",
    "image_layers": "n_image_layers",
    "image_vocab": "n_codes",
    "layers": "n_layers",
    "lr": "learning_rate.peak",
    "optimizer.lr": "learning_rate.peak",
    "pictures": "images",
    "recompute": "activation_checkpointing",
    "report_every": "validation.every",
    "rows": "prompt_rows",
    "schedules.lr": "learning_rate",
    "shard_samples": "samples_per_shard",
    "text_layers": "n_text_layers",
    "text_vocab": "vocab_size",
    "uri": "mlflow_uri",
    "vocab_size": "n_codes",
}
"""Old names of keys, or names of other projects, and the key to use instead. Messages about an unknown key suggest it."""

EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a section of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a section of keys",
    "model_type": "a section of keys",
    "path_type": "a path",
    "string_type": "text",
    "too_short": "at least {min_length} item(s)",
    "tuple_type": "a list",
}
"""What a value must be, by pydantic's type of the error; the braces are filled from its context."""
MAX_SHOWN = 200
SECTION_EXPECTED = ("dict_type", "model_attributes_type", "model_type")


def explain_all(config_class: type[BaseModel], problems: Sequence[Any], others: Sequence[str] = ()) -> list[str]:
    """Return a line per invalid key.

    Args:
        problems: `errors()` of pydantic's ValidationError.
        others: keys that the caller takes besides the config's.
    """
    lines: dict[str, list[str]] = {}
    for problem in problems:
        subject, said = _explain(config_class, problem, others)
        lines.setdefault(subject, []).append(said)
    # each type of a union has an error of its own
    said_once = {subject: " or ".join(dict.fromkeys(said)).replace(" or expected", " or") for subject, said in lines.items()}
    return [f"{subject}: {said}" if subject and said else subject or said for subject, said in said_once.items()]


def arms_of(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union of types, or the one type that is not a union."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def config_in(annotation: Any) -> type[BaseModel] | None:
    """Return the config class among the alternatives of a type, or None if there is none."""
    return next((arm for arm in arms_of(annotation) if isinstance(arm, type) and issubclass(arm, BaseModel)), None)


def annotation_of(config_class: type[BaseModel] | None, keys: Sequence[str]) -> Any:
    """Returns the type annotation of the field at path `keys`, or None if there is no such field."""
    field = config_class.model_fields.get(keys[0]) if keys and config_class is not None else None
    if field is None:
        return None
    return field.annotation if len(keys) == 1 else annotation_of(config_in(field.annotation), keys[1:])


def _explain(config_class: type[BaseModel], problem: Any, others: Sequence[str]) -> tuple[str, str]:
    """Returns the key with its value, and what is wrong with it."""
    value, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    keys = [str(part) for part in problem["loc"]]
    if kind == "extra_forbidden":
        return f"unknown key {'.'.join(keys)!r} = {_shown(value)}; {_about_unknown(config_class, keys, others)}", ""
    keys = _without_types(config_class, keys)
    location = ".".join(keys)
    if kind == "missing":
        return location, "required, but not set"
    if kind == "value_error":  # a check of ours
        said = str(context["error"]).removeprefix(f"{value}: ")
        # the value of a check of several fields is the whole section, which the message need not repeat
        return location if isinstance(value, Mapping | BaseModel) else f"{location} = {_shown(value)}", said
    if kind in EXPECTED:
        said = f"expected {EXPECTED[kind].format(**context)}"
    else:
        said = problem["msg"].replace("Input should be", "expected").replace("String should", "expected to")
    inner = config_in(annotation_of(config_class, keys))
    if inner is not None and kind in SECTION_EXPECTED:
        names = list(inner.model_fields)
        said = f"expected a section with the keys {', '.join(names)}, such as {location}.{names[0]}=VALUE"
    return f"{location} = {_shown(value)}" if location else "", said


def _shown(value: Any) -> str:
    """A value in a message: its first letters are enough to find it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _without_types(config_class: type[BaseModel], keys: list[str]) -> list[str]:
    """Remove the names of types that pydantic appends to the key of a union."""
    while len(keys) > 1 and annotation_of(config_class, keys) is None and annotation_of(config_class, keys[:-1]) is not None:
        if keys[-1].isdigit():  # index in a list
            break
        keys = keys[:-1]
    return keys


def _about_unknown(config_class: type[BaseModel], keys: list[str], others: Sequence[str]) -> str:
    parent = config_class
    for name in keys[:-1]:
        parent = config_in(annotation_of(parent, [name])) or parent
    known = sorted([*parent.model_fields, *(others if parent is config_class else ())])
    return f"known here: {', '.join(known)}{_hint(config_class, keys, known)}"


def _hint(config_class: type[BaseModel], keys: list[str], known: Sequence[str]) -> str:
    """The key that an unknown key stands for: the one in `RENAMED`, else a similar one in its section, else one anywhere."""
    prefix = "".join(f"{key}." for key in keys[:-1])
    everywhere = [*_dotted(config_class), *(f"{prefix}{key}" for key in known)]
    for old in (".".join(keys), keys[-1]):
        new = RENAMED.get(old, ())
        for name in (new,) if isinstance(new, str) else new:
            for candidate in (f"{prefix}{name}", name):
                if candidate in everywhere:
                    return f"; did you mean {candidate}?"
    here = [f"{prefix}{key}" for key in close_words(keys[-1], known)]
    return f"; did you mean {' or '.join(here)}?" if here else did_you_mean(keys[-1], everywhere)


def _dotted(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}"
        if (inner := config_in(field.annotation)) is not None:
            yield from _dotted(inner, f"{prefix}{name}.")
