"""What the documentation shows runs: code blocks, examples in docstrings, links, the site and the page of results."""

import doctest
import importlib.util
import re
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "genomics" / "pretrained").glob("*/README.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PACKAGES = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=named)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, as one script in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match.group(1), str(page), "exec"), vars(main))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    missing = [
        target
        for target in LINK.findall(page.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert not missing, f"{named(page)} links to missing {missing}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_tables_stand_apart(page):
    """A table right below a line of text is shown as text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    joined = re.findall(r"^(?!<!--)[^|\n].*\n(?=\|.*\n\|[ :|-]+\n)", text, re.MULTILINE)
    assert not joined, f"{named(page)} has a table right below {joined}"


def test_examples_in_docstrings():
    """Modules are imported by name: collecting them from files would load second copies."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " not in path.read_text():
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("omnissm", *(part for part in parts if part != "__init__")))
            result = doctest.testmod(import_module(name))
            assert result.failed == 0, name


def test_every_public_name_has_a_docstring():
    """Of all packages, constants too; their text stands below the assignment."""
    builder = script("docs/build.py")
    bare = {
        f"{module.__name__}.{name}"
        for module, names in builder.surfaces().items()
        for name in names
        if not builder.documented(module, name)
    }
    assert not bare


class Targets(HTMLParser):
    """What a page loads (`src`, stylesheets, icons), where it links to, and the names in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "src" in values:
            self.loaded.append(values["src"])
        if "href" in values:
            (self.links if tag == "a" else self.loaded).append(values["href"])
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical", reason='needs pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("docs") / "site"
    script("docs/build.py").build(folder)
    return folder


@pytest.mark.timeout(400)
def test_site_needs_no_network_and_no_server(site):
    """Everything a page loads lies beside it, and every link to another page ends at a heading that is there."""
    pages = {page: Targets(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 50
    for page, targets in pages.items():
        for target in targets.loaded:
            assert "//" not in target, f"{page.name} loads {target}"
            assert (page.parent / target.partition("?")[0]).exists(), f"{page.name} loads {target}"
        for target in targets.links:
            file, _, name = target.partition("#")
            if "://" in file or not target:
                continue
            other = (page.parent / file).resolve() if file else page
            assert other.is_file(), f"{page.name} links to {target}"
            assert not name or name in pages[other].names, f"{page.name} links to {target}"
    for style in (*site.rglob("*.css"), *site.rglob("search*.js")):
        assert not re.search(r"url\(\s*['\"]?https?:|importScripts\(['\"]http", style.read_text()), style.name


@pytest.mark.timeout(400)
def test_reference_shows_every_public_name(site):
    shown = script("docs/build.py").surfaces()
    packages = {module.__name__ for module in shown if hasattr(module, "__path__")}
    assert {f"omnissm.{name}" for name in PACKAGES} < packages
    for module, names in shown.items():
        assert module.__name__ not in packages or names == list(module.__all__)
        page = Targets(site / "api" / f"{module.__name__.removeprefix('omnissm.')}.html")
        missing = set(names) - {known.split(".")[-1] for known in page.names}
        assert not missing, f"{module.__name__}: {missing}"


@pytest.mark.timeout(400)
def test_build_stops_at_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("zensical", reason='needs pip install ".[docs]"')
    builder = script("docs/build.py")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "models.md").write_text("# Models\n")
    (docs / "site.yml").write_text("site_name: x\nuse_directory_urls: false\nnav: [index.md, models.md]\n")
    monkeypatch.setattr(builder, "DOCS", docs)
    monkeypatch.setattr(builder, "ROOT", tmp_path)
    monkeypatch.setattr(builder, "PAGES", {})
    monkeypatch.setattr(builder, "surfaces", dict)

    def build(text):
        (docs / "index.md").write_text(f"# Start\n\n{text}\n")
        builder.build(tmp_path / "site")

    with pytest.raises(ValueError, match=r"nowhere\.md, which does not exist"):
        build("[x](nowhere.md)")
    with pytest.raises(ValueError, match=r"nowhere\.png, which does not exist"):
        build("![x](images/nowhere.png)")
    with pytest.raises(ValueError, match="anchor does not exist"):
        build("[x](models.md#nowhere)")
    assert not (tmp_path / "site").exists()
    build("[x](models.md#models)")
    assert (tmp_path / "site" / "index.html").is_file()
    (docs / "lost.md").write_text("# Lost\n")
    with pytest.raises(ValueError, match=r"does not list lost\.md"):
        build("")


@pytest.mark.timeout(400)
def test_build_stops_at_docstrings_that_are_wrong(tmp_path, monkeypatch):
    pytest.importorskip("zensical", reason='needs pip install ".[docs]"')
    builder = script("docs/build.py")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Start\n")
    plugin = "{mkdocstrings: {handlers: {python: {paths: ['.'], options: {docstring_style: google}}}}}"
    settings = f"site_name: x\nuse_directory_urls: false\nplugins: [{plugin}]\nnav: [index.md]\n"
    (tmp_path / "docs" / "site.yml").write_text(settings)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "__init__.py").touch()
    source = 'def double(x: int) -> int:\n    """Twice.\n\n    Args:\n        y: A number.\n    """\n    return 2 * x\n'
    for name, value in (("DOCS", tmp_path / "docs"), ("ROOT", tmp_path), ("PAGES", {})):
        monkeypatch.setattr(builder, name, value)

    def build(text):
        (tmp_path / "kernels" / "__init__.py").write_text(text)
        module = ModuleType("omnissm.kernels", "Some kernels.")
        exec(text, vars(module))
        monkeypatch.setattr(builder, "surfaces", lambda: {module: ["double"]})
        builder.build(tmp_path / "site")

    with pytest.raises(ValueError, match="Parameter 'y' does not appear in the function signature"):
        build(source)
    with pytest.raises(ValueError, match=r"omnissm\.kernels\.double has no docstring"):
        build("def double(x: int) -> int:\n    return 2 * x\n")
    build(source.replace("y:", "x:"))
    assert "A number." in (tmp_path / "site" / "api" / "kernels.html").read_text()
