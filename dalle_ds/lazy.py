"""Names of a package that are imported when they are first used, so that `import dalle_ds` needs no torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package. Type checkers read the same names in its `__init__.pyi`.

    Args:
        homes: the module that defines each name; a submodule stands for itself.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(homes))}")
        module = import_module(homes[name])
        return module if module.__name__ == f"{package}.{name}" else getattr(module, name)

    return get, lambda: sorted(homes)
