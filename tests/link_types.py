"""Builds `.types/`: the import tree of package-dir as links, for tools that do not read package-dir."""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def link_tree(root: Path) -> Path:
    """Make `.types/` under `root` anew and return it."""
    tree = root / ".types"
    shutil.rmtree(tree, ignore_errors=True)
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    base = tree / "planish"
    base.mkdir(parents=True)
    for item in sorted((root / folders["planish"]).iterdir()):
        if item.suffix in {".py", ".typed"}:
            (base / item.name).symlink_to(item)
    for package, folder in folders.items():
        if package != "planish":
            (base / package.removeprefix("planish.")).symlink_to(root / folder, target_is_directory=True)
    return tree


if __name__ == "__main__":
    print(link_tree(ROOT))
