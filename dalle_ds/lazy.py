"""Lazy imports: a package's names are imported on first use, so that `import dalle_ds` does not import torch."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def large_imports() -> Iterator[None]:
    """Within, Python does not look for unreachable cycles. A large package makes a million objects and hardly a cycle, and the
    search takes a fifth of its import: 0.6 of 2.4 s of CPU with DeepSpeed and mlflow, 0.8 of 3.5 with transformers' CLIP.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
