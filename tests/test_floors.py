"""The house: imports point downward only, and the library is silent."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CLI = ROOT / "neuralsde_ito", ROOT / "cli"

HEAVY = {"torch", "torchvision", "torchsde", "torchdiffeq", "numpy", "scipy", "sklearn", "matplotlib", "neuralsde_ito"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def absolute(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    """The dotted names of modules that a statement may import, with relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = ["neuralsde_ito", *path.relative_to(PACKAGE).parent.parts]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    # `from . import noise` names the module only in the alias.
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in absolute(node, path):
                yield node.lineno, name


def test_imports_point_downward(monkeypatch, capsys):
    # The floors stand in pyproject.toml; a new room or file on the ground needs its place there.
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_knows_no_terminal(path):
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert not name.startswith(("neuralsde_ito.cli", "neuralsde_ito.configs")), where
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.relative_to(ROOT)}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "stderr"), f"{path.relative_to(ROOT)}:{node.lineno} writes"


@pytest.mark.parametrize("path", sources(CLI), ids=lambda p: p.name)
def test_the_command_line_imports_siblings_relatively_and_the_library_absolutely(path):
    # It lies in cli/ and is installed as neuralsde_ito.cli: `from ..noise` would work in one layout only.
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert node.level <= 1, f"{where}: reaches out of cli/ by a relative import"
            assert not (node.module or "").startswith("neuralsde_ito.cli"), f"{where}: a sibling, absolutely"
            if node.level == 1 and node.module:
                assert (CLI / f"{node.module.split('.')[0]}.py").is_file(), f"{where}: no such sibling"
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("neuralsde_ito.cli"), f"{path.name}:{node.lineno}"


def module_level(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported: not those in functions, nor those for type checkers only."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        todo += ast.iter_child_nodes(node)


LIGHT = ("neuralsde_ito.validation", "neuralsde_ito.distributed")
STARTED_FIRST = [CLI / "__init__.py", PACKAGE / "__init__.py", PACKAGE / "validation.py"]


@pytest.mark.parametrize("path", STARTED_FIRST, ids=lambda p: str(p.relative_to(ROOT)))
def test_help_does_not_wait_for_torch(path):
    # `import torch` takes seconds; --help and completion import these files alone.
    for node in module_level(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{where} imports a module before it is used"
        for name in names:
            assert name in LIGHT or name.split(".")[0] not in HEAVY, f"{where} imports {name}"


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_is_imported_without_torch(name):
    code = f"import sys, {name}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
