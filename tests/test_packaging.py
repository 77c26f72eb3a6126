"""The package list, the wheel, what an import loads, which way imports point, sizes, and paths of one machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {"planish": "compiler"} | {f"planish.{name}": name for name in ("passes", "backends", "models", "bench")}
DATA = {".c", ".h", ".j2", ".json", ".typed"}


def _package(folder: Path) -> str:
    """The import name of a folder of the tree."""
    top, *rest = folder.relative_to(ROOT).parts
    return ".".join(["planish" if top == "compiler" else f"planish.{top}", *rest])


def _files(suffixes: set[str]) -> list[Path]:
    """Source files of the package with these suffixes."""
    found = (path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _module(path: Path) -> str:
    package = _package(path.parent)
    return package if path.name == "__init__.py" else f"{package}.{path.stem}"


MODULES = {_module(path): path for path in _files({".py"})}


def test_package_list_equals_tree() -> None:
    tree = {_package(path.parent) for path in _files({".py"})}
    assert set(SETUPTOOLS["packages"]) == tree
    assert SETUPTOOLS["package-dir"] == FOLDERS
    for package in tree:
        assert f"{package}.__init__" in {f"{_package(p.parent)}.{p.stem}" for p in MODULES.values()}, package


def test_modules_of_the_root_package_hide_no_subpackage() -> None:
    hidden = {"passes", "backends", "models", "bench"} & {path.stem for path in (ROOT / "compiler").iterdir()}
    assert not hidden


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources (a build in the tree would race with other workers), unpacked."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    _run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(source / "out"), str(source)], source)
    (wheel,) = (source / "out").glob("*.whl")
    _run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], source)
    return site


def _run(command: list[str], cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.needs_weights  # planish.models.minilm imports transformers
def test_wheel_imports_every_module_in_a_fresh_folder(wheel_folder: Path, tmp_path: Path) -> None:
    # A user's own `passes` or `models` folder must not get in the way.
    for name in ("passes", "models", "compiler"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user folder was imported')\n")
    script = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(wheel_folder)!r})\n"
        f"for name in {sorted(MODULES)!r}:\n"
        "    file = importlib.import_module(name).__file__\n"
        f"    assert file.startswith({str(wheel_folder)!r}), (name, file)\n"
    )
    (tmp_path / "script.py").write_text(script)
    _run([sys.executable, "script.py"], tmp_path)


def test_wheel_has_every_data_file(wheel_folder: Path) -> None:
    for path in _files(DATA):
        assert (wheel_folder / _package(path.parent).replace(".", "/") / path.name).is_file(), path


def test_wheel_has_licence_and_command(wheel_folder: Path) -> None:
    assert list(wheel_folder.glob("planish-*.dist-info/licenses/LICENSE"))
    assert "planish = planish.cli:main" in next(wheel_folder.glob("planish-*.dist-info/entry_points.txt")).read_text()


@pytest.mark.parametrize("module", ["planish", "planish.cli", "planish.errors", "planish.targets"])
def test_import_loads_neither_torch_nor_tvm(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'tvm', 'numpy', 'transformers'}} & set(sys.modules)))"
    assert _run([sys.executable, "-c", code], tmp_path).strip() == "[]"


def test_public_names_resolve() -> None:
    import planish

    missing = [name for name in planish.__all__ if getattr(planish, name, None) is None]
    assert not missing
    assert set(planish.__all__) <= set(dir(planish))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = planish.no_such_name


def test_version_matches_the_metadata() -> None:
    import planish

    assert planish.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


# What each layer may import, apart from itself. `base` is what all others stand on.
# `pipeline` defines what a pass is and is handed the passes by `api`, so the import points from passes to it.
LAYERS: dict[str, set[str]] = {
    "base": set(),
    "pipeline": {"base"},
    "passes": {"base", "pipeline"},
    "backends": {"base"},
    "api": {"base", "passes", "backends", "pipeline"},
    "models": {"base"},
    "bench": {"base", "passes", "backends", "pipeline", "api", "models"},
    "cli": {"base", "passes", "backends", "pipeline", "api", "models", "bench"},
}
ROOT_LAYERS = {
    "pipeline": "pipeline",
    "rules": "pipeline",
    "verify": "pipeline",
    "dump": "pipeline",
    "capture": "api",
    "fallback": "api",
    "mutation": "api",
    "size_one": "api",
    "reuse": "api",
    "state": "api",
    "decoder": "api",
    "api": "api",
    "bundle": "api",
    "dynamo": "api",
    "cli": "cli",
    "demo": "cli",
    "__main__": "cli",
}


def _layer(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "root"
    return parts[1] if parts[1] in {"passes", "backends", "models", "bench"} else ROOT_LAYERS.get(parts[1], "base")


def _runtime_nodes(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Nodes that run: bodies of `if TYPE_CHECKING` are left out, functions' bodies only when asked for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        yield child
        yield from _runtime_nodes(child, inside_functions=inside_functions)


def _imports(path: Path, *, inside_functions: bool) -> set[str]:
    """Modules of planish that a file imports."""
    names: set[str] = set()
    for node in _runtime_nodes(ast.parse(path.read_text()), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports of planish in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
    return {name for name in names if name in MODULES}


def test_layers_point_one_way() -> None:
    wrong: list[str] = []
    for module, path in MODULES.items():
        layer = _layer(module)
        if layer == "root":
            continue
        allowed = LAYERS[layer] | {layer, "root"}
        wrong += [
            f"{module} ({layer}) imports {name} ({_layer(name)})"
            for name in sorted(_imports(path, inside_functions=True))
            if _layer(name) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    edges = [
        (module, name)
        for module, path in MODULES.items()
        for name in _imports(path, inside_functions=False)
        if name not in {module, "planish"}
    ]
    assert not list(networkx.simple_cycles(networkx.DiGraph(edges)))


def test_root_package_imports_nothing_of_its_own_when_loaded() -> None:
    assert not _imports(MODULES["planish"], inside_functions=False)


@pytest.mark.parametrize("path", [pytest.param(p, id=m) for m, p in MODULES.items()])
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 600, f"{path.name}: split it by idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(child, ast.stmt) for child in ast.walk(node)) - 1
            assert statements <= 50, f"{path.name}:{node.lineno} {node.name}: {statements} statements"


def test_no_paths_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.)}])/(?:work|root|home|opt|tmp)/")
    made = {"build", "dist", "dump", "__pycache__"}
    hits = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(ROOT.rglob("*"))
        if path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".c", ".h", ".j2", ""}
        and path.is_file()
        and not any(
            part in made or part.endswith(".egg-info") or (part.startswith(".") and part not in {".ci", ".gitignore"})
            for part in path.relative_to(ROOT).parts
        )
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits
