"""The documentation: what is made from the code is complete, links lead somewhere, the check of the pages can fail."""

import ast
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from scvae.inference.svi import Training
from scvae.programs import PROGRAMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def module(name):
    """A script of the documentation, which is no part of a package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


generate, check = module("generate"), module("check")
MADE = ("_build", "api", "benchmarks", "fragments", "tutorials", "contributing.md")
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in MADE)


def test_every_option_of_every_program_and_of_the_training_is_said_to_mean_something():
    for options in [*(program.Options for program in PROGRAMS.values()), Training]:
        rows = "\n".join(generate.table_of(options)).splitlines()[2:]
        assert [row.split("`")[1] for row in rows] == [field.name for field in fields(options)]
        for row in rows:
            _, _, may_be, _, meaning, _ = re.split(r"(?<!\\)\|", row)
            assert may_be.strip(), row
            assert len(meaning.strip()) > 5, row
            assert ":`" not in meaning.replace("}`", ""), row


def test_messages_are_taken_from_the_source_with_gaps_for_what_differs(tmp_path):
    source = tmp_path / "some.py"
    source.write_text(
        "def f(n):\n"
        "    if n:\n"
        '        raise ValueError(f"There are {n} cells" + " where two are wanted.")\n'
        "    raise ValueError(n)\n"
    )
    assert generate.messages_in(source) == [("ValueError", "There are … cells where two are wanted.")]


def test_the_messages_of_every_module_are_listed_by_subject():
    text = "\n".join(generate.messages())
    assert set(generate.SUBJECTS) <= set(re.findall(r"### (.*)", text))
    for path in (ROOT / "scvae").rglob("*.py"):
        for kind, message in generate.messages_in(path):
            assert f"- *{kind}*: {generate.plain(message)}" in text
    assert "The AnnData has no cells." in text


def test_every_command_of_the_command_line_shows_its_help():
    text = "\n".join(generate.help_of_commands())
    for command in ("fit", "embed", "transfer", "tune", "demo"):
        assert f"## `scvae {command}`" in text
        assert f"Usage: scvae {command} " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_relative_link_of_a_page_leads_to_a_file_and_to_a_page(page):
    text = page.read_text()
    made = {ROOT / "docs" / path for path in generate.PLACED.values()}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("#"):
            continue
        assert (page.parent / link.split("#")[0]).exists(), link
        (here,) = re.findall(r"\]\(([^)\s]+)\)", generate.linked(f"[a]({link})", page, page))
        target = (page.parent / here.split("#")[0]).resolve()
        assert here.startswith(generate.REPOSITORY) or target.exists() or target in made, here


def test_the_page_of_a_file_that_is_no_longer_there_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    (tmp_path / "tutorials").mkdir()
    (tmp_path / "tutorials" / "old.ipynb").write_text("{}")
    (tmp_path / "mine.md").write_text("mine")
    generate.pages()
    assert {path.name for path in (tmp_path / "tutorials").iterdir()} == {
        "index.md", *(path.name for path in (ROOT / "tutorials").glob("*.ipynb"))
    }  # fmt: skip
    assert (tmp_path / "mine.md").exists()


def test_links_lead_from_a_copied_page_to_pages_and_into_the_repository():
    source, target = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "contributing.md"
    text = "[a](CHANGELOG.md) [b](.ci/run) [c](https://x.org/y) [d](#here) [e](tests/benchmarks/README.md#there)"
    assert generate.linked(text, source, target) == (
        f"[a](changelog.md) [b]({generate.REPOSITORY}/blob/main/.ci/run) [c](https://x.org/y) [d](#here) "
        "[e](benchmarks/index.md#there)"
    )


@pytest.mark.parametrize("source", sorted(ROOT.glob("tutorials/*.ipynb")), ids=lambda path: path.stem)
def test_links_of_a_tutorial_lead_to_files_and_from_its_copy_to_pages(source, monkeypatch):
    written = []
    monkeypatch.setattr(generate, "write", lambda path, text: written.append(text))
    generate.place(source, target := DOCS / "tutorials" / source.name)
    made = {DOCS / path for path in generate.PLACED.values()}
    for folder, text, places in ((source.parent, source.read_text(), ()), (target.parent, written[0], made)):
        cells = json.loads(text)["cells"]
        words = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)\s]+)\)", words):
            to = (folder / link.split("#")[0]).resolve()
            assert "://" in link or to.exists() or to in places, link


def test_every_public_name_has_a_page():
    api = (ROOT / "docs" / "api.md").read_text()
    for package in ("", "pp", "tl", "pl"):
        path = ROOT / "scvae" / package / "__init__.py"
        (names,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        )
        for name in set(names) - {"datasets", "pl", "pp", "tl"}:
            assert f"   scvae.{package}.{name}\n".replace("..", ".") in api, name


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b.html#here">b</a> <a href="https://x.org/none">x</a>', None),
        ('<a href="none.html">c</a>', "leads nowhere"),
        ('<img src="none.png">', "leads nowhere"),
        ('<a href="b.html#none">b</a>', "no such place"),
        ('<script src="https://x.org/a.js"></script> <link rel="canonical" href="https://x.org/b">', "loaded from"),
        ('<link rel="stylesheet" href="//x.org/a.css">', "loaded from"),
        ("<p>so $$ x $$</p>", "mathematics"),
        (r"<p>so \frac{1}{2}</p>", "mathematics"),
        (r'<p><span class="math">\(\frac{1}{2}\)</span> <code>\frac $$</code> US$ 5</p>', None),
    ],
)
def test_the_check_of_the_built_pages(body, fault, tmp_path):
    (tmp_path / "a.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "b.html").write_text('<html><body><p id="here">b</p></body></html>')
    found = check.faults(tmp_path)
    assert (fault is None and found == []) or (len(found) == 1 and fault in found[0])


def test_the_check_wants_pages(tmp_path):
    assert check.faults(tmp_path)
