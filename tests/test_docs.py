"""The documentation: pages are whole, code compiles, each public name is in the reference once, the site builds."""

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import pyro_lvm
from tests import browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))


def source(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^(```+).*?^\1$", "", source(page), flags=re.DOTALL | re.MULTILINE)


def cells(page: Path) -> list[str]:
    """The code of each cell, without the options before it."""
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", source(page), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\A(---\n.*?^---\n|(:[^\n]*\n)*)", "", cell, flags=re.DOTALL | re.MULTILINE) for cell in found]


def toctree(page: Path) -> list[Path]:
    """The pages that a page holds."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", source(page), flags=re.DOTALL | re.MULTILINE)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    return [(page.parent / f"{entry}.md").resolve() for entry in entries]


def test_every_page_is_in_a_toctree() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        assert page not in reached, f"{page} is in two toctrees"
        reached.add(page)
        waiting += toctree(page)
    assert reached == set(PAGES)


def test_no_outputs_are_stored() -> None:
    assert not [path for path in DOCS.rglob("*.ipynb") if "_build" not in path.parts]
    assert not [page for page in PAGES if "data:image" in source(page)]


@EVERY_PAGE
def test_cells_compile(page: Path) -> None:
    code = cells(page)
    assert len(code) == source(page).count("```{code-cell}")
    assert bool(code) == source(page).startswith("---\nfile_format: mystnb\n")  # without it cells are not run
    for cell in code:
        lines = [line for line in cell.splitlines() if not line.startswith("%")]  # `%matplotlib inline`
        compile("\n".join(lines), str(page), "exec")


@EVERY_PAGE
def test_pictures_have_words(page: Path) -> None:
    """A reader who does not see a picture reads its ``alt``."""
    shown = re.findall(r"^(?:figure|plots\.\w+\(.*|.*\.figure|.*\.plot\(\))$", "\n".join(cells(page)), re.MULTILINE)
    assert len([alt for alt in re.findall(r"^    alt: (.+)$", source(page), re.MULTILINE) if alt]) >= len(shown)


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@EVERY_PAGE
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)\s]*))?\)", prose(page)):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            named = re.findall(r"^\((\S+)\)=$", source(there), re.MULTILINE)
            headings = re.findall(r"^#+ (.+)$", source(there), re.MULTILINE)
            assert anchor in [*named, *map(slug, headings)], f"{page}: #{anchor}"


# ---------------------------------------------------------------- the reference


def public_names(module: ModuleType, path: str) -> Iterator[tuple[str, Any]]:
    """Name -> object of whatever a module and the public modules in it have."""
    for name in module.__all__:
        found = getattr(module, name)
        yield f"{path}.{name}", found
        if inspect.ismodule(found):
            yield from public_names(found, f"{path}.{name}")


def test_every_public_name_is_in_the_reference_once() -> None:
    text = "\n".join(source(page) for page in sorted((DOCS / "api").glob("*.md")))
    documented = re.findall(r"^\.\. (?:auto\w+|py:data|module):: (\S+)$", text, re.MULTILINE)
    names = dict(public_names(pyro_lvm, "pyro_lvm"))
    for name, found in names.items():
        own = callable(found) or inspect.ismodule(found)  # else equal values may be one object
        same = {other for other, value in names.items() if value is found} if own else {name}
        assert len([entry for entry in documented if entry in same]) == 1, f"{name}: {documented.count(name)} times"
    returned = {entry for entry in documented if entry not in names} - {"pyro_lvm"}
    assert returned == {  # what public functions return or call, and nobody makes
        "pyro_lvm.comparison.ComparisonRow",
        "pyro_lvm.guides.refine.Refinement",
        "pyro_lvm.training.History",
        "pyro_lvm.training.TrainingState",
    }


# ---------------------------------------------------------------- the site

BUILDERS = ("sphinx", "myst_nb", "furo", "latex2mathml")


class Parts(HTMLParser):
    """Anchors of a page, and the places that it leads to or takes something from."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values or (tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload")):
            self.resources.append(values.get("src") or values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in a folder of its own, with warnings as errors."""
    missing = [name for name in BUILDERS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f'{missing} are not installed: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    before = {*DOCS.rglob("*"), *ROOT.iterdir()}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, str(DOCS), str(folder / "html")], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-4000:]
    left = {*DOCS.rglob("*"), *ROOT.iterdir()} - before
    assert not left, f"the build has left {left}"
    return folder / "html"


@pytest.mark.slow
@pytest.mark.long
def test_built_pages_lead_somewhere_and_take_nothing_from_elsewhere(site: Path) -> None:
    pages = {path: Parts(path) for path in sorted(site.rglob("*.html"))}
    assert len(pages) > len(PAGES)
    for path, parts in pages.items():
        assert not [place for place in parts.resources if urlsplit(place).scheme not in ("", "data")], path
        for place in parts.resources + parts.links:
            link = urlsplit(place)
            if link.scheme:
                continue
            there = (path.parent / unquote(link.path)).resolve() if link.path else path
            assert there.is_file(), f"{path}: {place}"
            if link.fragment and there in pages:
                assert unquote(link.fragment) in pages[there].anchors | {"top"}, f"{path}: {place}"


SHOWN = ["index", "start", "lecture", "es/lecture", "numbers", "how_to_choose", "performance", "plots", "api/fit"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(browser.find() is None, reason="there is no Chromium on PATH")
@pytest.mark.parametrize("name", SHOWN)
def test_a_browser_shows_pages(site: Path, name: str) -> None:
    page = site / f"{name}.html"
    dom = browser.dump_dom(page)
    headings = re.findall(r"^(#+) (.+)$", prose(DOCS / f"{name}.md"), re.MULTILINE)
    assert headings
    for marks, words in headings:
        plain = re.sub(r"[`*]", "", words)
        shown = [re.sub(r"<[^>]*>|\N{PILCROW SIGN}|#$", "", text).strip() for text in _tags(dom, f"h{len(marks)}")]
        assert any(_same(plain, text) for text in shown), f"{words!r} is not among {shown}"
    assert _same(re.sub(r"[`*]", "", headings[0][1]), _tags(dom, "title")[0].removesuffix(" - pyro_lvm"))
    for width in (1280, 390):
        assert browser.overflow(page, width) == 0, f"{name} scrolls sideways on {width} pixels"


def _tags(dom: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", dom, re.DOTALL)


def _same(one: str, other: str) -> bool:
    """Equal but for quotation marks and entities, which the site makes pretty."""
    return re.sub(r"\W|&\w+;", "", one) == re.sub(r"\W|&\w+;", "", other)
