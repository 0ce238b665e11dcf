"""Public names: fast to import, and the same in the package, its stub file and its documentation."""

import ast
import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_ds
from dalle_ds.lazy import large_imports

PACKAGE = Path(dalle_ds.__file__).parent


def test_import_brings_in_no_large_package():
    program = """
import sys
import dalle_ds
dalle_ds.data, dalle_ds.UserError, dir(dalle_ds), dir(dalle_ds.data)
print([name for name in ("torch", "numpy", "pydantic", "fsspec", "mlflow", "PIL") if name in sys.modules])
import dalle_ds.interface.loading, dalle_ds.data.tokens.loading
print([name for name in ("deepspeed", "mlflow", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize("name", ["dalle_ds", "dalle_ds.data"])
def test_stub_package_and_list_of_names_agree(name):
    package = importlib.import_module(name)
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text())
    homes = {alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = set(package.__all__) - {"__version__"}
    assert homes.keys() == public == set(dir(package))
    for public_name, home in homes.items():
        assert getattr(package, public_name) is getattr(importlib.import_module(home), public_name)


def test_type_checkers_find_types():
    assert (PACKAGE / "py.typed").exists()


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dalle_ds' has no attribute 'lode'; it has .*load"):
        dalle_ds.lode  # noqa: B018
    assert not hasattr(dalle_ds.data, "opened")


def test_cycles_are_collected_again_after_a_large_import() -> None:
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            with pytest.raises(ImportError), large_imports():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == was_on
        finally:
            gc.enable()
