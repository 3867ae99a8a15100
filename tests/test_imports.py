"""Import rules: between the layers, in tests, and relative to torch."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "colorfilter": {"dagster", "resources", "assets", "pipelines", "commands"},
    "resources": {"assets", "pipelines", "commands"},
    "assets": {"pipelines", "commands"},
    "pipelines": {"commands"},
    "commands": set(),
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_down(package: str) -> None:
    modules = list((ROOT / package).rglob("*.py"))
    assert modules
    for module in modules:
        upward = imported(module) & FORBIDDEN[package]
        assert not upward, f"{module} imports {upward}"


def modules_imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, of modules and of what is in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def programs(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield a module, and the programs that it has as strings."""
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and "import " in str(node.value):
            with contextlib.suppress(SyntaxError):
                yield ast.parse(str(node.value))


def exists(name: str) -> bool:
    """Return whether a dotted name is a module of the project, or a name at the top of one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module = path.parent.with_suffix(".py")
    module = module if module.exists() else path.parent / "__init__.py"
    if not module.exists():
        return False
    tree = ast.parse(module.read_text(encoding="utf-8"))
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return path.name in stored | made | {m.split(".")[-1] for m in modules_imported(tree)}


def test_every_import_is_of_something_that_exists() -> None:
    """Also in programs that tests have as strings."""
    for folder in (*FORBIDDEN, "tests", "benchmarks"):
        for module in (ROOT / folder).rglob("*.py"):
            for program in programs(ast.parse(module.read_text(encoding="utf-8"))):
                for name in modules_imported(program):
                    if name.split(".")[0] in {*FORBIDDEN, "tests"}:
                        assert exists(name), f"{module} imports {name}"


def is_private(name: str) -> bool:
    return re.fullmatch(r"_(?!_).*", name) is not None


def private_names() -> set[str]:
    """Return the private names that the packages define, also those of methods and attributes."""
    found = set()
    for module in (m for package in FORBIDDEN for m in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


def names_used(tree: ast.AST) -> Iterator[str]:
    """Yield the names by which a module reaches into others: imports, attributes, patches.

    An attribute of `self` is the module's own.
    """
    for name in modules_imported(tree):
        if name.split(".")[0] in FORBIDDEN:
            yield from name.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", "patch")):
            texts = (a.value for a in node.args if isinstance(a, ast.Constant))
            yield from (name for text in texts for name in str(text).split("."))


def test_no_test_imports_another() -> None:
    for module in (ROOT / "tests").rglob("*.py"):
        for name in modules_imported(ast.parse(module.read_text(encoding="utf-8"))):
            package, *parts = name.split(".")
            others = [p for p in parts if p.startswith("test_")] if package == "tests" else []
            assert not others, f"{module} imports {name}; move what they share to a helper module"


def test_tests_use_public_names_only() -> None:
    private = private_names()
    for module in (ROOT / "tests").rglob("*.py"):
        used = set(names_used(ast.parse(module.read_text(encoding="utf-8")))) & private
        assert not used, f"{module} uses {used}"


@pytest.mark.parametrize("package", ["assets", "resources", "pipelines", "commands"])
def test_torch_is_imported_inside_functions_only(package: str) -> None:
    for module in (ROOT / package).rglob("*.py"):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers"}, module


@pytest.mark.parametrize(
    "module", ["commands.cli", "pipelines.graph", "colorfilter.compute.ray_pool"]
)
def test_a_process_that_hands_work_out_does_not_load_torch(module: str) -> None:
    """Nor by way of another library: it takes seconds, in each of a cluster's workers too."""
    pytest.importorskip("ray")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_benchmarks_import_colorfilter_before_torch() -> None:
    for module in (ROOT / "benchmarks").glob("*.py"):
        order = [
            (node.names[0].name if isinstance(node, ast.Import) else str(node.module)).split(".")[0]
            for node in ast.parse(module.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        for heavy in {"torch", "transformers"} & set(order):
            assert order.index("colorfilter") < order.index(heavy), module


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_asleep_unless_the_user_says_how(
    given: dict[str, str], found: dict[str, str]
) -> None:
    names = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    bare = {name: value for name, value in os.environ.items() if name not in names}
    program = (
        f"import colorfilter, os; print({{n: os.environ[n] for n in {names} & {{*os.environ}}}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**bare, **given},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(done.stdout) == found
