"""Build commands of setuptools that copy launchers, recipes and DeepSpeed JSON into the package of a wheel.

The files lie outside the package, where setuptools' `package-data` does not reach. pyproject.toml names these classes.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

PACKAGE = Path(__file__).resolve().parent


def _project_files() -> Any:
    """Load `dalle_ds.project_files` of the tree being built: an import might find an installed version instead."""
    spec = spec_from_file_location("project_files_of_this_tree", PACKAGE / "project_files.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write_commit(package: Path) -> None:
    files = _project_files()
    if (commit := files.commit()) is not None:
        (package / files.COMMIT_FILE).write_text(f"{commit}\n", encoding="utf-8")


class BuildPy(build_py):
    """Build the package, with the shipped files of `launchers/` and `ds_configs/`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an editable install uses the files of the checkout
            return
        for target, source in self._shipped().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)
        _write_commit(Path(self.build_lib, PACKAGE.name))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._shipped().values()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._shipped()]

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **self._shipped()}

    def _shipped(self) -> dict[str, str]:
        """Return path in the built tree -> path in the source tree."""
        files = _project_files()
        return {str(Path(self.build_lib, PACKAGE.name, files.IN_WHEEL, name)): name for name in files.names()}


class Sdist(sdist):
    """Add the commit to a source distribution, so that wheels built from it without git have it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        _write_commit(Path(base_dir, PACKAGE.name))
