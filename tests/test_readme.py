"""README: its examples run, its tables equal the registries (`--update-golden` writes them)."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _targets() -> str:
    from planish.targets import TARGETS

    rows = [[f"`{t.name}`", t.backend, t.doc] for t in TARGETS.values()]
    return _markdown(["target", "backend", "what it is"], rows)


def _passes() -> str:
    from planish.passes import REGISTRY

    rows = [
        [f"`{p.name}`", ", ".join(sorted(p.needs)), ", ".join(sorted(p.makes)), f"{p.tol:g}", p.doc]
        for p in REGISTRY.values()
    ]
    return _markdown(["pass", "needs", "makes", "tolerance", "what it does"], rows)


def _models() -> str:
    from planish.models import MODELS

    rows = [[f"`{m.name}`", f"`planish[{m.extra}]`", m.doc] for m in MODELS.values()]
    return _markdown(["model", "install", "what it is"], rows)


TABLES = {"targets": _targets, "passes": _passes, "models": _models}


@pytest.mark.parametrize("name", TABLES)
def test_tables_equal_the_registries(name: str, update_golden: bool) -> None:
    table = TABLES[name]()
    wanted = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
    text = README.read_text()
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
    if update_golden:
        README.write_text(pattern.sub(lambda _: wanted, text))
        return
    found = pattern.search(text)
    assert found, f"README.md has no <!-- {name} --> markers"
    assert found.group() == wanted, "run: pytest tests/test_readme.py --update-golden"


def test_there_are_examples() -> None:
    assert EXAMPLES
    assert len(EXAMPLES[0].strip().splitlines()) == 5


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
