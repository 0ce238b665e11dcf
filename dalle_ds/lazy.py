"""Lazy imports: a package's names are imported on first use, so that `import dalle_ds` does not import torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__getattr__` and `__dir__` for a package. Type checkers read the same names from the package's `__init__.pyi`.

    Args:
        package: name of the package.
        homes: for each name, the module that defines it. A submodule is listed under its own name with its own path.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
        module = import_module(homes[name])
        return module if module.__name__ == f"{package}.{name}" else getattr(module, name)

    return get, lambda: sorted(homes)
