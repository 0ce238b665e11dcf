"""Every link, file and name of the project in READMEs and on the pages of launchers/ exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dalle_ds", "preprocessing", "ds_configs", "launchers", "tests")
PAGES = sorted({ROOT / "README.md", *ROOT.glob("launchers/*.md"), *(p for r in ROOMS for p in (ROOT / r).rglob("README.md"))})
SUFFIXES = {".py", ".sh", ".sbatch", ".yaml", ".json", ".cpp", ".html"}
SOURCES = [p for r in ROOMS for p in (ROOT / r).rglob("*") if p.suffix in SUFFIXES and p != Path(__file__)]
# names of other projects, and files that a run writes
FOREIGN = {"GatheredParameters", "GradScaler", "offload_param", ".deepspeed_env", "recipe.yaml"}
FILE = re.compile(r"[\w./*-]+\.(py|sh|sbatch|cpp|html|yaml|md)|zero\w+\.json")
OF_FILE = re.compile(r"(?:`([^`\s]+\.py)`|\]\(([^)\s]+\.py)\))((?: `[\w.]+`,?)+)")  # `file.py` `Class.method`, `function`
IN_FULL = re.compile(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w./*-]*")  # paths from the root of the repository, in commands too
MODULE = re.compile(r"(?<![\w/.-])(?:dalle_ds|preprocessing)(?:\.\w+)+")


@cache
def words() -> set[str]:
    return {word for file in (*SOURCES, ROOT / "pyproject.toml") for word in re.findall(r"\w+", file.read_text())}


@cache
def names_in(file: Path) -> set[str]:
    """Returns the names `function`, `Class` and `Class.attribute` that a module defines."""
    tree = ast.parse(file.read_text())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {*_assigned(tree), *(f"{node.name}.{attribute}" for node in classes for attribute in _assigned(node))}


def _assigned(scope: ast.AST) -> Iterator[str]:
    for node in ast.walk(scope):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def is_defined(symbol: str) -> bool:
    start = re.compile(rf"^\s*(?:class|def) {symbol.partition('.')[0]}\b", re.MULTILINE)
    return any(symbol in names_in(file) for file in SOURCES if file.suffix == ".py" and start.search(file.read_text()))


def files(page: Path, name: str) -> list[Path]:
    """Returns the files that `name` on `page` may mean: beside the page, below the root, a recipe, or a test of its folder."""
    mirror = ROOT / "tests" / str(page.parent.relative_to(ROOT)).removeprefix("dalle_ds").lstrip("/")
    folders = (page.parent, ROOT, mirror, ROOT / "launchers/recipes")
    return [hit for folder in folders for hit in folder.glob(name.replace("NAME", "*"))]


def broken(page: Path) -> Iterator[str]:
    text = page.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (path for path in IN_FULL.findall(text) if not any(ROOT.glob(path.rstrip("./"))))
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        holder = path.parent.with_suffix(".py")
        if not (path.exists() or path.with_suffix(".py").exists() or (holder.exists() and path.name in names_in(holder))):
            package, _, name = module.rpartition(".")
            if not ((path.parent / "__init__.py").exists() and name in getattr(import_module(package), "__all__", ())):
                yield module
    for link, anchor in re.findall(r"\]\((?!\w+://)([^)\s#]*)#?([^)\s]*)\)", prose):
        target = page.parent / link
        if not target.exists():
            yield link
        elif anchor and f"#-{anchor}\n" not in re.sub(r"[^\w\n#-]", "", target.read_text().lower().replace(" ", "-")):
            yield f"{link}#{anchor}"
    for file, link, symbols in OF_FILE.findall(prose):
        names = set().union(*map(names_in, files(page, file or link)))
        yield from (f"{symbol} in {file or link}" for symbol in re.findall(r"`([\w.]+)`", symbols) if symbol not in names)
    for span in set(re.findall(r"`([^`]+)`", prose)) - FOREIGN:
        if FILE.fullmatch(span):
            if not files(page, span):
                yield span
        elif re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)*(\(\))?|[a-z_]\w*\(\)", span):  # Class, Class.method, function()
            if not is_defined(span.removesuffix("()")):
                yield span
        elif re.fullmatch(r"[\w.]*_[\w.]*", span) and not set(span.strip(".").split(".")) <= words():  # keys, fields, functions
            yield span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert list(broken(page)) == [], "names that the repository does not have"
