"""The house: imports point downward only, and the library is silent."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CLI = ROOT / "neuralsde_ito", ROOT / "cli"

# Module -> floor. A module imports from the floors below its own; a folder counts as one module.
FLOORS = {
    "validation": -1,  # the ground: how everybody above words what is wrong
    "threads": -1,  # and how work is spread over a CPU
    "fused": -1,  # and what a state goes through in one pass
    "turns": -1,  # and how long measurements share it
    "live": -1,  # and how much memory it holds
    "schedules": 0,
    "noise": 0,
    "resnets": 0,
    "data": 0,
    "outcomes": 0,
    "votes": 0,
    "sde": 1,
    "solvers": 1,
    "recast": 2,
    "frozen": 2,
    "engine": 2,
    "problems": 2,
    "ensemble": 3,
    "attacks": 3,
    "selection": 3,
    "convergence": 3,
    "comparison": 3,
    "depth": 3,
    "peers": 3,
    "checkpoints": 4,
    "config": 4,
    "evaluation": 4,
    "training": 4,
    "recipes": 4,
    "benchmark": 4,
    "suite": 4,
    "bundle": 4,
    "verification": 4,
    "subject": 5,
    "checking": 5,
    "binarisation": 5,
    "gradcheck": 5,
    "checks": 5,
    "audit": 5,
}
# Within a floor: who may import whom.
NEIGHBOURS = {
    "votes": {"outcomes"},
    "solvers": {"sde"},
    "frozen": {"recast"},
    "engine": {"frozen", "recast"},
    "attacks": {"ensemble"},
    "selection": {"attacks", "ensemble"},
    "convergence": set(),
    "comparison": {"convergence", "ensemble"},
    "peers": {"convergence"},
    "checkpoints": {"config"},
    "training": {"checkpoints", "config", "evaluation"},
    "recipes": {"checkpoints", "config", "evaluation", "training"},
    "suite": {"checkpoints"},
    "benchmark": {"evaluation", "suite"},
    "bundle": {"checkpoints", "suite"},
    "verification": {"bundle", "suite"},
    "checking": {"subject"},
    "binarisation": {"checking", "subject"},
    "gradcheck": {"checking", "subject"},
    "checks": {"binarisation", "checking", "gradcheck", "subject"},
    "audit": {"checking", "checks", "subject"},
}
FORBIDDEN = {"click", "tqdm"}  # the library knows no terminal
HEAVY = {"torch", "torchvision", "torchsde", "torchdiffeq", "numpy", "scipy", "sklearn", "matplotlib", "neuralsde_ito"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    """``attacks/pgd.py`` -> ``attacks``, ``noise.py`` -> ``noise``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def inner_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Imports of the package's own modules: the line, and the module's name in the table."""
    for line, name in imports(path):
        package, _, inner = name.partition(".")
        module = inner.split(".")[0]
        known = (PACKAGE / module).is_dir() or (PACKAGE / f"{module}.py").is_file()
        if package == "neuralsde_ito" and module and known:
            yield line, module


LIBRARY = [path for path in sources(PACKAGE) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = module_of(path)
    assert own in FLOORS, f"{own} has no floor: give it one in FLOORS, in tests/test_floors.py"
    for line, other in inner_imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {other}"
        assert other in FLOORS, f"{where}, which has no floor: give it one in FLOORS, in tests/test_floors.py"
        allowed = other == own or FLOORS[other] < FLOORS[own] or other in NEIGHBOURS.get(own, ())
        assert allowed, f"{where}: floor {FLOORS[own]} must not import from floor {FLOORS[other]}"


def test_the_neighbours_form_no_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        assert all(FLOORS[name] == FLOORS[other] for other in NEIGHBOURS.get(name, ())), name
        if name not in done:
            for other in NEIGHBOURS.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in NEIGHBOURS:
        visit(name, ())


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_knows_no_terminal(path):
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert name.split(".")[0] not in FORBIDDEN, where
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


STARTED_FIRST = [CLI / "__init__.py", PACKAGE / "__init__.py", PACKAGE / "validation.py"]


@pytest.mark.parametrize("path", STARTED_FIRST, ids=lambda p: str(p.relative_to(ROOT)))
def test_help_does_not_wait_for_torch(path):
    # `import torch` takes seconds; --help and completion import these files alone.
    for node in module_level(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{where} imports a module before it is used"
        for name in names:
            assert name == "neuralsde_ito.validation" or name.split(".")[0] not in HEAVY, f"{where} imports {name}"


def test_a_light_module_is_imported_without_torch():
    code = "import sys, neuralsde_ito.validation; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
