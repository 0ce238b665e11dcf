"""Read the YAML of recipes and of KEY=VALUE words: each key once, and no more than a recipe can need."""

from pathlib import Path
from typing import Any

import yaml

from dalle_ds.errors import ConfigError

MAX_BYTES = 4 << 20
MAX_VALUES, MAX_DEPTH = 100_000, 50
"""Values and nesting of a document with all its aliases written out. A few lines of aliases can stand for billions."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice. YAML forbids it, but PyYAML keeps the last value without a word."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and (n_values := _n_values(node, {})) > MAX_VALUES:
            raise yaml.YAMLError(f"{n_values:.3g} values with its aliases written out, expected at most {MAX_VALUES}")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"key {key!r} on line {line} is already on line {lines[key]}; expected each key once")
            lines[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain values.

    Raises:
        yaml.YAMLError: invalid YAML, a key twice, aliases to itself, or more than a recipe can need.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except (ValueError, TypeError, OverflowError) as error:  # of a value, such as an integer of 5,000 digits
        raise yaml.YAMLError(str(error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a recipe file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, not valid YAML or not a mapping of names.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"recipe {path} has more than {MAX_BYTES >> 20} MB; expected a YAML file of settings")
        tree = parse_yaml(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ConfigError(f"recipe {path} is not UTF-8: byte 0x{byte:02x} on line {line}; expected text in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} contains a {type(tree).__name__}, expected a mapping of keys")
    unnamed = [key for key in tree if not isinstance(key, str)]
    if unnamed:
        raise ConfigError(f"recipe {path}: key {unnamed[0]!r} is a {type(unnamed[0]).__name__}, expected the name of a section")
    return tree


def _n_values(node: yaml.Node, counted: dict[int, float]) -> float:
    """Number of values of a node with its aliases written out."""
    known = counted.get(id(node))
    if known is not None:
        return known
    counted[id(node)] = float("inf")  # until it is known: a node that contains itself is endless
    parts = () if isinstance(node, yaml.ScalarNode) else node.value  # of a mapping: pairs of key and value
    children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    counted[id(node)] = 1 + sum(_n_values(child, counted) for child in children)
    return counted[id(node)]
