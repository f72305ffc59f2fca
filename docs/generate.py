"""The pages, and parts of pages, that are made of what the repository holds already.

Nothing of it is kept in git: :func:`pages` writes it anew at each build, and touches only what has changed.
"""

import ast
import inspect
import json
import re
import shutil
import tomllib
import typing
import zlib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

# Files of the repository that are pages here, or beside them.
PLACED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/index.md": "index.md",
    "tutorials/README.md": "tutorials/index.md",
    **{f"tutorials/{path.name}": f"tutorials/{path.name}" for path in sorted((ROOT / "tutorials").glob("*.ipynb"))},
    **{
        str(path.relative_to(ROOT)): f"benchmarks/{'index.md' if path.name == 'README.md' else path.name}"
        for path in [*(ROOT / "tests/benchmarks").glob("*.md"), *(ROOT / "tests/benchmarks/results").glob("*.md")]
    },
    **{f"tests/benchmarks/results/{name}.png": f"benchmarks/{name}.png" for name in ("suite", "cpu")},
}


# Titles of tables that scripts wrote, and what they show.
RESULTS = {
    "suite": """Real cells beside scVI, Harmony and PCA

Means of three seeds, of scVI of its own. PCA and Harmony are those of logarithms of counts per ten thousand; `scaled`,
of counts per median total, each gene with a variance of 1.

| column | what it is |
| --- | --- |
| `total_knn` | 0.6 × biology (`clusters`, `transfer`) + 0.4 × mixing (`cilisi`, connectivity) |
| `total` | the same with scores of distances, silhouettes, which reward embeddings without structure |
| `transfer` | balanced accuracy of the labels that the nearest cells of the other batches give |
| `cilisi` | mixing of batches among the nearest cells of the same label, from 0 to 1 |
| `clusters` | agreement of Leiden's clusters with the labels, mean of ARI and NMI |
| `log_likelihood` | of test cells, importance-weighted, nats a cell |
| `seconds` | of a fit, on two cores beside other programs |

![Sets and methods](suite.png)
""",
    "labels": """Labels of a tenth of the cells

A tenth of the labels that are given are wrong. The scores are those of the cells without a label.
""",
    "mapping": """New batches mapped onto a reference

Each of the three largest batches in turn is the query, and the others are the reference.
""",
}


def pages() -> None:
    """Write all of it into the folder of the documentation, and remove pages of files that are no longer there."""
    kept = {*PLACED.values(), "benchmarks/cpu.md"}
    for folder in ("tutorials", "benchmarks"):
        for path in (DOCS / folder).glob("*.*"):
            if f"{folder}/{path.name}" not in kept:
                path.unlink()
    for source, target in PLACED.items():
        place(ROOT / source, DOCS / target)
    write(DOCS / "benchmarks/cpu.md", "\n".join(measurements(ROOT / "tests/benchmarks/results/cpu.json")))
    for name, text in {
        "options": "\n".join(tables_of_options()),
        "commands": "\n".join(help_of_commands()),
        "messages": "\n".join(messages()),
    }.items():
        write(DOCS / "fragments" / f"{name}.md", text)


def place(source: Path, target: Path) -> None:
    """Copy a file of the repository to where it is a page, so that its links lead to pages or into the repository."""
    target.parent.mkdir(exist_ok=True)
    if source.suffix == ".ipynb":
        notebook = json.loads(source.read_text())
        for part in notebook["cells"]:
            if part["cell_type"] == "markdown":
                part["source"] = linked("".join(part["source"]), source, target)
        write(target, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    elif source.suffix != ".md":
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    elif source.parent != DOCS and target.name != "changelog.md":
        text = linked(source.read_text(), source, target)
        if source.stem in RESULTS:  # tables that a script wrote
            text = f"# {RESULTS[source.stem]}\n\n{text}"
        if target.name == "index.md":
            inside = [Path(path).stem for path in PLACED.values() if Path(path).parent.name == target.parent.name]
            named = [Path(link).stem for link in re.findall(r"\]\(([^)\s:#]+)\)", text)]  # in the order of its table
            inside = [name for name in dict.fromkeys(named + inside) if name in inside and name != "index"]
            names = "\n".join(inside)
            text += f"\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
        write(target, text)


def measurements(path: Path) -> Iterator[str]:
    """Return a table of each part of the measurements of speed and memory."""
    found = json.loads(path.read_text())
    yield f"# Speed and memory on a CPU\n\n{found['machine']}, shared with other programs. Units end the names.\n"
    yield "![Time of a step, time to quality, growth](cpu.png)\n"
    for part, rows in found.items():
        if not isinstance(rows, dict):
            continue
        nested = part == "quality"  # by set
        flat = {f"{name}, {of}": row for name, each in rows.items() for of, row in each.items()} if nested else rows
        flat = {name: row for name, row in flat.items() if isinstance(row, dict) and not name.endswith("ratios")}
        columns = list(dict.fromkeys(key for row in flat.values() for key, value in row.items() if key != "ratios"))
        yield f"\n## {PARTS[part]}\n\n| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}"
        for name, row in flat.items():
            yield f"| {name} | {' | '.join(f'{row[key]:,.4g}' if key in row else '' for key in columns)} |"


PARTS = {
    "step": "A step of the training, 128 cells × 2,000 genes",
    "quality": "Until a model is as likely as scvi-tools makes it",
    "growth": "From ten thousand cells to a million",
    "integration": "100,000 simulated cells in four batches, and scores of the embedding",
    "crowded": "Beside four busy programs on two cores",
}


def linked(text: str, source: Path, target: Path) -> str:
    """Return a text of a file of the repository with its relative links as they are from its page."""

    def lead(link: re.Match[str]) -> str:
        path, _, anchor = link[2].partition("#")
        if "://" in path or not path:
            return link[0]
        here = (source.parent / path).resolve()
        if not here.is_relative_to(ROOT) or not here.exists():
            return link[0]
        name = str(here.relative_to(ROOT))
        if here.is_relative_to(DOCS):
            to = here.relative_to(DOCS)
        elif name in PLACED:
            to = Path(PLACED[name])
        else:
            return f"{link[1]}{REPOSITORY}/{'tree' if here.is_dir() else 'blob'}/main/{name})"
        up = "../" * (len(target.relative_to(DOCS).parts) - 1)
        return f"{link[1]}{up}{to.as_posix()}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(\]\()([^)\s]+)\)", lead, text)


def write(path: Path, text: str) -> None:
    """Write a text where it differs from what is there, so that Sphinx reads again what has changed only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def tables_of_options() -> Iterator[str]:
    """Return a table of the options of each program, and one of those of the training."""
    from scvae.inference.svi import Training
    from scvae.programs import PROGRAMS

    for name, program in PROGRAMS.items():
        yield f"\n## `{name}`\n\n{{class}}`scvae.programs.{program.__name__}`: {first_line(program)}\n"
        yield from table_of(program.Options)
    yield "\n## Training\n\nThese go with every program.\n"
    yield from table_of(Training)


def resolve_options() -> None:
    """Let autodoc see the types of options, which are named in several modules, as the types that they are."""
    from scvae.programs import PROGRAMS

    for program in PROGRAMS.values():
        hints = typing.get_type_hints(program.Options, include_extras=True)
        of_init = program.Options.__init__.__annotations__
        of_init.update({name: hints[name] for name in of_init if name in hints})


def first_line(of: type) -> str:
    return myst((inspect.getdoc(of) or "").split("\n\n")[0])


def table_of(options: type) -> Iterator[str]:
    """Return the rows of a table: each option, what it may be, its default and what it means."""
    from scvae.boundary.options import allowed

    said = meanings(options)
    yield "| option | what it may be | default | what it means |\n| --- | --- | --- | --- |"
    for field in fields(options):
        default = "" if field.default is MISSING else f"`{quoted(field.default)}`"
        may_be = re.sub(r"'(\w[\w-]*)'", r'`"\1"`', allowed(options, field.name))
        yield f"| `{field.name}` | {cell(may_be)} | {default} | {cell(said[field.name])} |"


def quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:,g}" if isinstance(value, float) else str(value)


def meanings(options: type) -> dict[str, str]:
    """Return what the docstrings of a class and of those that it is made of say of each option."""
    found: dict[str, str] = {}
    for each in options.__mro__:
        doc = inspect.cleandoc(each.__doc__ or "")
        _, _, parameters = doc.partition("Parameters\n----------\n")
        for names, text in re.findall(r"^(\w[\w, ]*)\n((?:(?: {4}.*)?\n)+)", parameters + "\n", re.M):
            for name in names.split(", "):
                if not text.strip().startswith("As in :class:"):
                    found.setdefault(name, myst(text))
    return found


def myst(text: str) -> str:
    """Return a text of a docstring as Markdown."""
    text = " ".join(text.split())
    text = re.sub(r":(?:py:)?(\w+):`([^`]+)`", r"{\1}`\2`", text)
    return text.replace("``", "`")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def help_of_commands() -> Iterator[str]:
    """Return what ``--help`` says of each command."""
    import typer.testing

    from scvae.commands.app import app

    names = [info.callback.__name__ for info in app.registered_commands]
    for name in names:
        words = (
            typer.testing.CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"}, prog_name="scvae").output
        )
        yield f"\n## `scvae {name}`\n\n```text\n{words.strip()}\n```"


SUBJECTS = {
    "Cells, counts and columns": (
        "boundary/containers boundary/keys data/reading data/schemas data/cells data/categories data/summary"
    ),
    "Files, folders and saved models": (
        "boundary/files boundary/locks boundary/models boundary/outputs boundary/formats boundary/weights "
        "boundary/hdf5 fits/saved"
    ),
    "Cells in files": (
        "fits/sources data/tables data/store data/stored data/shuffling data/bins data/results data/variable_genes "
        "data/order"
    ),
    "Options and configurations": "boundary/options fits/configurations fitting fits/choices comparing tuning",
    "Programs, priors and posteriors": "programs modules distributions kernels",
    "Training, checkpoints and several processes": "inference boundary/process boundary/ranks boundary/signals",
    "Questions to a fitted model": "fitted fits/asking fits/denoising fits/generating fits/extending fits/writing",
    "Analyses": "tl",
    "Images, positions and neighbourhoods": "pp",
    "Figures": "pl",
    "Data sets and the demonstration": "datasets demo",
    "Command line": "commands __main__",
}


def messages() -> Iterator[str]:
    """Return the messages of errors and warnings in the source, by subject; what differs from case to case is …"""
    package = ROOT / "scvae"
    left = {str(path.relative_to(package).with_suffix("")): path for path in sorted(package.rglob("*.py"))}
    for subject, places in SUBJECTS.items():
        rows = []
        for place in places.split():
            for name in [each for each in left if each == place or each.startswith(f"{place}/")]:
                rows += messages_in(left.pop(name))
        yield from section_of(subject, rows)
    yield from section_of("Elsewhere", [row for path in left.values() for row in messages_in(path)])


def section_of(subject: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    """Return the messages about a subject, each once."""
    if rows:
        yield f"\n### {subject}\n"
        yield from (f"- *{kind}*: {plain(text)}" for kind, text in dict.fromkeys(rows))


def messages_in(path: Path) -> list[tuple[str, str]]:
    """Return kind and text of each error and warning of a file that says something in so many words."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            kind, arguments = node.exc.func.id, node.exc.args
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
            kind, arguments = "warning", node.args
        else:
            continue
        text = re.sub(r"…[…\s]*…", "…", " ".join(worded(arguments[0]).split())) if arguments else ""
        if len(re.sub(r"\W", "", text)) >= 15:
            found.append((kind, text))
    return found


def worded(node: ast.expr) -> str:
    """Return the text that an expression makes, with … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(worded(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return worded(node.left) + worded(node.right)
    return "…"


def plain(text: str) -> str:
    """Return a message as text, in which no sign is taken for markup."""
    return re.sub(r"([\\`*_{}\[\]<>|$~#])", r"\\\1", text)


def inventories() -> dict[str, tuple[str, Path]]:
    """Write an inventory for each project in references.txt, and return its address and where it lies."""
    written, project, address, names = {}, "", "", []
    for line in [*(DOCS / "references.txt").read_text().splitlines(), "[end] -"]:
        if line.startswith("["):
            if project:
                path = DOCS / "fragments" / f"{project}.inv"
                head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
                head += "# The remainder of this file is compressed using zlib.\n"
                body = "".join(f"{name} {role} 1 {place} -\n" for name, role, place in names)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(head.encode() + zlib.compress(body.encode()))
                written[project] = (address, path)
            project, address, names = *re.fullmatch(r"\[(\w+)\] (\S+)", line).groups(), []
        elif line and not line.startswith("#"):
            names.append(line.split())
    return written


# Where other projects document a class that is defined elsewhere.
PUBLIC = {
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "matplotlib.axes._axes.Axes": "matplotlib.axes.Axes",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.core.series.Series": "pandas.Series",
    "scipy.sparse._csr.csr_matrix": "scipy.sparse.csr_matrix",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}


def typed(annotation: object, _: object = None) -> str | None:
    """Return what a type is called in a list of parameters, where that is not its own name."""
    if typing.get_origin(annotation) is typing.Annotated:
        number, within = typing.get_args(annotation)[:2]
        return f":class:`{number.__name__}` {within}"
    name = f"{getattr(annotation, '__module__', '')}.{getattr(annotation, '__qualname__', '')}"
    return f":class:`~{PUBLIC[name]}`" if name in PUBLIC else None
