"""Figures in the docs come from docs/results/; pages say what the tree has."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(build):
    for page in build.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- table:" in text
        assert build.filled(text) == text, f"{page.name} is stale: run python docs/build.py"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them"""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_inside_the_docs_lead_somewhere():
    folders = (ROOT / "docs", ROOT / "demo" / "model", ROOT / "demo" / "loras", ROOT / "web" / "docs")
    for page in [*ROOT.glob("*.md"), *(p for folder in folders for p in sorted(folder.glob("*.md")))]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                file, _, place = target.partition("#")
                led = page.parent / file if file else page
                assert led.exists() and (not place or place in anchors(led)), f"{page.name}: {target}"


def test_every_promise_names_a_test_or_a_script_that_there_is():
    """Of docs/RELIABILITY.md: each file exists, and each word after -k is in the name of one of its tests"""
    rows = (
        (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8").split("| promise")[1].split("\n\n")[0].splitlines()[2:]
    )
    for row in rows:
        promise, _, shown = row.strip("| ").partition(" | ")
        files = re.findall(r"(tests/[\w/]+\.py)(?: -k (?:\"([^\"]+)\"|(\w+)))?", shown)
        scripts = re.findall(r"python -m ([\w.]+)", shown)
        assert files or scripts or promise.startswith("**"), promise
        assert all((ROOT / (s.replace(".", "/") + ".py")).exists() for s in scripts), promise
        for file, several, one in files:
            tests = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
            for word in (several or one).split(" or ") if several or one else [""]:
                assert any(word in t for t in tests), f"{promise}: no test of {file} is called {word!r}"


def test_the_import_order_of_the_docs_is_the_tested_one():
    from .test_structure import LAYERS

    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text.split("holds it):")[1].split("```")[1].strip().splitlines()
    assert [set(line.split()) for line in block] == LAYERS


def test_the_first_screen_names_both_commands_and_what_to_open():
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for name in ("make demo", "make test", "`bring_your_own_loras`", "`teach_a_concept`", "(docs/TUTORIAL.md)"):
        assert name in first, name
