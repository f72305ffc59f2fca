"""The project holds together: light import, one version, links that lead somewhere, examples that parse."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scvae

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "data/README.md")),
    *(ROOT / "docs" / name for name in ("index.md", "model.md", "mapping.md")),
]


def names(requirements):
    return {re.match(r"[\w.-]+", r).group().lower() for r in requirements}


def test_import_leaves_alone_what_only_plots_scores_downloads_or_serves_the_command_line():
    optional = ("scanpy", "matplotlib", "sklearn", "typer", "pooch", "igraph", "leidenalg", "umap")
    code = f"import sys, scvae; scvae.fit; print(*[name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_import_waits_for_torch_until_something_is_asked_for():
    code = "import sys, scvae; print('torch' in sys.modules, *dir(scvae), hasattr(scvae, 'no_such_name'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
    assert done.stdout.rstrip().endswith("False")
    assert set(scvae.__all__) <= set(done.stdout.split())


def test_the_version_is_that_of_the_project():
    assert scvae.__version__ == PROJECT["version"]
    (date,) = re.findall(
        rf"^## \[{scvae.__version__}\] - (\d{{4}}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {scvae.__version__}", f"date-released: {date}"} <= set(citation)


def test_the_project_has_one_address():
    home = PROJECT["urls"]["Repository"]
    name = home.removeprefix("https://github.com/")
    texts = [path.read_text() for path in ROOT.glob("*.*") if path.suffix in (".md", ".toml", ".cff")]
    texts += [path.read_text() for path in (ROOT / ".github").rglob("*.yml")]
    found = set(re.findall(r"github(?:usercontent)?\.com/([\w-]+/scvae[\w-]*)", "\n".join(texts)))
    assert found == {name}


def test_links_and_pictures_of_the_readme_lead_somewhere_from_the_package_index():
    text = (
        ROOT / "README.md"
    ).read_text() + '<img alt="a" src="docs/demo.png"> ![a](docs/demo.png) [b](LICENSE) [c](#use)'
    for each in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"].replace("$HFPR_VERSION", scvae.__version__), text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    raw = f"https://raw.githubusercontent.com/scvae-pyro/scvae-pyro/v{scvae.__version__}/docs/demo.png"
    assert targets.count(raw) >= 2
    assert f"[b]({PROJECT['urls']['Repository']}/blob/v{scvae.__version__}/LICENSE)" in text
    assert "[c](#use)" in text


def test_the_extra_for_all_brings_every_other_that_a_user_may_want():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    brought = set(re.fullmatch(r"scvae-pyro\[([\w,]+)\]", everything)[1].split(","))
    assert brought == set(PROJECT["optional-dependencies"]) - {"all", "dev", "docs"}


def test_every_public_name_is_there_and_documented():
    for name in scvae.__all__:
        assert getattr(scvae, name).__doc__, name


def pins(path):
    """Name and version of each line of a file of constraints, which may hold for some versions of Python only."""
    lines = (ROOT / path).read_text().splitlines()
    matches = [re.fullmatch(r'([\w.-]+)==([\w.]+)(; python_version (<|>=) "3\.\d+")?', line) for line in lines]
    assert None not in matches
    return [(match[1].lower().replace("_", "-"), match[2]) for match in matches]


def test_every_requirement_has_a_tested_version():
    tested = {name for name, _ in pins("constraints.txt")}
    asked = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    assert asked - {PROJECT["name"]} <= tested


def test_every_lower_bound_is_the_lowest_tested_version():
    groups = PROJECT["optional-dependencies"]
    requirements = PROJECT["dependencies"] + [
        r for group in groups if group not in ("analysis", "docs") for r in groups[group]
    ]
    bounds = {}
    for requirement in requirements:
        name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(?:>=([\d.]+)(?:,!=[\d.]+)*)?", requirement).groups()
        if name != PROJECT["name"]:
            bounds[name] = bound and release(bound)
    lowest = {name: release(version) for name, version in pins("constraints-lowest.txt") if name in bounds}
    assert bounds == lowest


def release(version):
    """``2.1`` and ``2.1.0`` are one version."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_the_extra_for_development_brings_what_the_tests_import():
    groups = PROJECT["optional-dependencies"]
    brought = names(PROJECT["dependencies"]).union(*(names(groups[group]) for group in ("dev", "demo", "workflow")))
    brought |= names(groups["analysis"]) | names(groups["cli"]) | names(groups["datasets"])
    brought |= {"h5py", "scvae"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    distribution = {
        "pyro": "pyro-ppl",
        "sklearn": "scikit-learn",
        "skmisc": "scikit-misc",
        "scib_metrics": "scib-metrics",
    }
    imported = set()
    tests = [path for path in (ROOT / "tests").rglob("*.py") if "benchmarks" not in path.parts]
    for path in [*(ROOT / "scvae").rglob("*.py"), *tests]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    needed = {distribution.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert needed <= brought


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = [
        link for link in links
        if "://" not in link and not link.startswith("#") and not (page.parent / link.split("#")[0]).exists()
    ]  # fmt: skip
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_example_parses(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(block)


def test_the_readme_names_only_what_the_model_has():
    text = (ROOT / "README.md").read_text()
    assert {"embed", "denoise", "generate", "elbo", "log_likelihood", "save"} <= set(
        re.findall(r"model\.(\w+)\(", text)
    )
    for method in re.findall(r"model\.(\w+)\(", text):
        assert callable(getattr(scvae.Fitted, method)), method
    for function in re.findall(r"scvae\.((?:\w+\.)*\w+)\(", text):
        target = scvae
        for part in function.split("."):
            target = getattr(target, part)
        assert callable(target), function
