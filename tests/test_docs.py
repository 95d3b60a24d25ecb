"""What the README, the docs and the docstrings show works as shown."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_cli import LIMIT, environment

import logkv
from logkv import backup, codecs, dbm, shelve, verification

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [importlib.import_module(module.name) for module in pkgutil.walk_packages(logkv.__path__, "logkv.")
           if not module.name.endswith("__main__")]
SESSIONS = ("README.md", "docs/getting-started.md", "docs/command-line.md")     # can be typed along
PUBLIC = {thing for module in (logkv, logkv.errors, backup, codecs, dbm, shelve, verification)
          for name, thing in vars(module).items()
          if not name.startswith("_") and callable(thing) and thing.__module__.startswith("logkv.")
          and (thing.__module__ == module.__name__ or name in getattr(module, "__all__", ()))}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each."""
    return re.findall(r"^```(python|console)\n(.*?)^```", page.read_text(), re.M | re.S)


def programs(page: Path) -> list[str]:
    return [text for language, text in examples(page) if language == "python"]


WITH_PROGRAMS = [page for page in PAGES if programs(page)]


# -- examples -------------------------------------------------------------------------------------------------

def run_program(text: str, directory: Path) -> None:
    """It ends well, and complains about nothing."""
    (directory / "example.py").write_text(text)
    ended = subprocess.run([sys.executable, "-W", "default::ResourceWarning", "example.py"], cwd=directory, text=True,
                           capture_output=True, env=environment(), timeout=LIMIT)
    assert (ended.returncode, ended.stderr) == (0, ""), text


def run_session(text: str, directory: Path) -> None:
    """Typed one after the other into one shell, each command prints what is shown."""
    steps = [(re.sub(r"^> ", "", typed, flags=re.M), shown)
             for typed, shown in re.findall(r"^\$ (.*\n(?:> .*\n)*)((?:(?!\$ ).*\n)*)", text, re.M)]
    assert steps, text
    script = 'logkv() { "$PYTHON" -m logkv "$@"; }\n' + "".join(
        f"{typed}status=$?; printf '\\n@@@\\n'; (exit $status)\n" for typed, _ in steps)
    ended = subprocess.run(["bash"], input=script, cwd=directory, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, env=environment(PYTHON=sys.executable), timeout=LIMIT)
    for (typed, shown), printed in zip(steps, ended.stdout.removesuffix("@@@\n").split("@@@\n"), strict=True):
        shown, printed = shown.strip("\n") + "\n", printed.strip("\n") + "\n"   # `get` adds none to a value here
        assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS), f"$ {typed}{printed}"


@pytest.mark.parametrize("page, number", [(page, number) for page in WITH_PROGRAMS
                                         for number in range(len(programs(page)))],
                         ids=lambda part: name_of(part) if isinstance(part, Path) else str(part))
def test_each_program_by_itself(page: Path, number: int, tmp_path: Path) -> None:
    run_program(programs(page)[number], tmp_path)


@pytest.mark.parametrize("page", sorted({*WITH_PROGRAMS, *(ROOT / name for name in SESSIONS)}), ids=name_of)
def test_a_page_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    """All of it in one directory."""
    for language, text in examples(page):
        if language == "python":
            run_program(text, tmp_path)
        elif name_of(page) in SESSIONS:
            run_session(text, tmp_path)


def test_types_of_programs(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    for page in WITH_PROGRAMS:
        for number, text in enumerate(programs(page)):
            (tmp_path / f"{re.sub('[^a-z]', '_', name_of(page).lower())}_{number}.py").write_text(text)
    ended = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache",
                            *sorted(file.name for file in tmp_path.iterdir())], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(MYPYPATH=str(ROOT)))
    assert ended.returncode == 0, ended.stdout


def test_the_pages_for_newcomers_have_examples() -> None:
    assert len(programs(ROOT / "README.md")) >= 2
    for name in ("getting-started", "durability", "drop-ins", "coming-from"):
        assert programs(ROOT / f"docs/{name}.md"), name
    for name in SESSIONS:
        assert "console" in dict(examples(ROOT / name)), name


@pytest.mark.parametrize("module", [module for module in [logkv, *MODULES]
                                    if any(test.examples for test in doctest.DocTestFinder().find(module))],
                         ids=lambda module: module.__name__)
def test_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_docstrings_were_looked_for() -> None:
    assert {"logkv.store", "logkv.dbm", "logkv.cli", "logkv._core"} <= {module.__name__ for module in MODULES}


# -- links ----------------------------------------------------------------------------------------------------

def anchors(page: Path) -> set[str]:
    """As code hosts make them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)]+)\)", index)}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {ROOT / "docs/README.md"} <= linked


# -- what is said of the code ------------------------------------------------------------------------------------

def test_the_map_of_the_code_is_whole() -> None:
    """Everything in CONTRIBUTING's map is there, and every module is in the map."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    mapped = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    assert [name for name in mapped if not (ROOT / name).exists()] == []
    assert [name for name, times in Counter(mapped).items() if times > 1] == []
    files = [ROOT / "setup.py", *(ROOT / "ext").iterdir(), *(ROOT / "logkv").rglob("*.py*"),
             *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert {name_of(file) for file in files if file.suffix != ".pyc" and file.stat().st_size} - {*mapped} == set()


def test_the_make_targets_are_told() -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    assert targets == set(re.findall(r"^\| `make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.M))


def test_the_reference_is_current() -> None:
    """If not: `make docs`."""
    assert (ROOT / "docs/api.md").read_text() == runpy.run_path(str(ROOT / "docs/reference.py"))["render"]()


def test_every_field_of_stats_is_explained(path: str) -> None:
    fields = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs/getting-started.md").read_text(), re.M))
    with logkv.open(path) as db:
        assert set(db.stats()) == fields


def full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@pytest.mark.parametrize("thing", sorted(PUBLIC, key=full_name), ids=full_name)
def test_every_public_name_has_a_docstring(thing: Any) -> None:
    assert thing.__doc__
    fields = getattr(thing, "__dataclass_fields__", ())
    for kind in getattr(thing, "__mro__", ()):
        for name, member in vars(kind).items() if kind.__module__.startswith("logkv.") else ():
            if not name.startswith("_") and name not in fields:
                assert member.__doc__, name
