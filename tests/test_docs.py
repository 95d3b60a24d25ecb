"""What the README, the docs and the docstrings show works as shown."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import logkv.errors
import logkv.files
import logkv.store

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page, number, block) for page in PAGES
          for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))]


@pytest.mark.parametrize("page, number, block", BLOCKS, ids=[f"{page.name}-{number}" for page, number, _ in BLOCKS])
def test_examples(page: Path, number: int, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"{page.name}, example {number}", "exec"), {})


def test_the_readme_has_examples() -> None:
    assert sum(page.name == "README.md" for page, _, _ in BLOCKS) >= 2


@pytest.mark.parametrize("module", [logkv, logkv.store, logkv.errors, logkv.files])
def test_docstrings(module: object) -> None:
    assert doctest.testmod(module).failed == 0      # type: ignore[arg-type]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_public_name_has_a_docstring() -> None:
    for name in logkv.__all__:
        thing = getattr(logkv, name)
        assert thing.__doc__, name
        if isinstance(thing, type) and not issubclass(thing, Exception):
            for member in vars(thing):
                if not member.startswith("_"):
                    assert getattr(thing, member).__doc__, f"{name}.{member}"
