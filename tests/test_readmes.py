"""READMEs and the pages of launchers/: every link, file and name of the project in them exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dalle_ds", "preprocessing", "ds_configs", "launchers", "tests")
PAGES = sorted({ROOT / "README.md", *ROOT.glob("launchers/*.md"), *(p for r in ROOMS for p in (ROOT / r).rglob("README.md"))})
SOURCES = {".py", ".sh", ".sbatch", ".yaml", ".json", ".cpp", ".html"}
# names of other projects, and of what a run writes
FOREIGN = {"GaussianBlur", "GatheredParameters", "GradScaler", "ExcludedPackage"}
FILE = re.compile(r"[\w./*-]+\.(py|sh|sbatch|cpp|html|yaml|md)|zero\w+\.json")
IN_FILE = re.compile(r"(?:`([^`\s]+\.py)`|\]\(([^)\s]+\.py)\))((?: `[\w.]+`,?)+)")  # `file.py` `Class.method`, `function`


@cache
def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def _sources() -> list[Path]:
    return [p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in SOURCES and p != Path(__file__)]


@cache
def _words() -> set[str]:
    return {word for file in (*_sources(), ROOT / "pyproject.toml") for word in re.findall(r"\w+", _text(file))}


@cache
def _names(file: Path) -> set[str]:
    """`function`, `Class` and `Class.attribute` of a module, inherited ones included where the base is beside the class."""

    def inside(scope: ast.AST) -> Iterator[str]:
        for node in ast.walk(scope):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.id if isinstance(node, ast.Name) else node.attr

    tree = ast.parse(_text(file))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    names = set(inside(tree))
    for name, node in classes.items():
        bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        names |= {f"{name}.{attribute}" for scope in (node, *bases) for attribute in inside(scope)}
    return names


def _is_defined(symbol: str) -> bool:
    first = re.compile(rf"^\s*(?:class|def) {symbol.partition('.')[0]}\b", re.MULTILINE)
    return any(symbol in _names(file) for file in _sources() if file.suffix == ".py" and first.search(_text(file)))


def _files(page: Path, name: str) -> list[Path]:
    """What `name` is on this page: beside it, below the root, a recipe, or a test in the folder that mirrors the page's."""
    mirror = ROOT / "tests" / str(page.parent.relative_to(ROOT)).removeprefix("dalle_ds").lstrip("/")
    tests = [*mirror.rglob(name)] if re.fullmatch(r"test_[\w*]+\.py", name) else []
    return [*tests, *(hit for folder in (page.parent, ROOT, mirror, ROOT / "launchers/recipes") for hit in folder.glob(name))]


def _broken(page: Path) -> Iterator[str]:
    whole = _text(page)
    for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w./*-]*", whole):
        if not any(ROOT.glob(path.rstrip("./") or ".")):
            yield f"file {path}"
    for module in re.findall(r"(?<![\w/.-])(?:dalle_ds|preprocessing)(?:\.\w+)+", whole):
        path, _, last = module.replace(".", "/").rpartition("/")
        package = [ROOT / path / "__init__.py", ROOT / f"{path}.py"]
        if not any(ROOT.glob(f"{path}/{last}*")) and not any(p.exists() and last in _names(p) for p in package):
            yield f"module {module}"
    prose = re.sub(r"^```.*?^```$", "", whole, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if "://" not in link and not (page.parent / link).exists():
            yield f"link {link}"
    for name, link, symbols in IN_FILE.findall(prose):
        names = set().union(*map(_names, _files(page, name or link)))
        yield from (f"{symbol} in {name or link}" for symbol in re.findall(r"`([\w.]+)`", symbols) if symbol not in names)
    for span in re.findall(r"`([^`]+)`", prose):
        if FILE.fullmatch(span):
            if not _files(page, span.replace("NAME", "*")) and span != "recipe.yaml":
                yield f"file {span}"
        elif re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)*(\(\))?|[a-z_]\w*\(\)", span):
            if span.partition(".")[0] not in FOREIGN and not _is_defined(span.removesuffix("()")):
                yield f"name {span}"
        elif re.fullmatch(r"[\w.]*_[\w.]*", span):
            yield from (f"name {span}" for word in span.split(".") if word not in _words())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert not (found := list(dict.fromkeys(_broken(page)))), f"{page}: " + "; ".join(found)
