"""Tests that need a missing tool are skipped by name and counted; with PLANISH_NO_SKIPS=1 they fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("strict", [False, True])
def test_missing_compiler(strict: bool, workers: str, root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    needs_cxx\n    needs_weights\n    gpu\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.needs_cxx\ndef test_needs(): pass\ndef test_plain(): pass\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PLANISH"))}
    env |= {"PATH": str(tmp_path / "nothing-here")} | ({"PLANISH_NO_SKIPS": "1"} if strict else {})
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    if strict:
        assert done.returncode == 1
        assert "wanted tool missing: g++" in done.stdout
    else:
        assert done.returncode == 0
        assert "test_it.py::test_needs\n1 tests not run" in done.stdout
