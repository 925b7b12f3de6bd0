"""The page of a comparison, as text and as a real browser shows it."""

import math
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import rcParams

import pyro_lvm as lvm
from pyro_lvm.comparison import ComparisonRow
from pyro_lvm.report import page, verdict
from tests import browser
from tests.plots.records import comparison, log_marginal

in_a_browser = pytest.mark.skipif(browser.find() is None, reason=f"none of {browser.NAMES} is on PATH")
WIDTHS = {"phone": 390, "desktop": 1280}


class Page(HTMLParser):
    """Elements and their texts: tables by rows of cells, items of lists, and pairs of description lists."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.scopes, self.items, self.terms, self.ids = [], [], [], [], {}, []
        self._texts, self._last = {}, {}  # of elements that are open, and of the last one of each kind
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self._texts[tag] = ""
        if tag == "tr":
            self.rows.append([])
        if tag == "th":
            self.scopes.append(attributes.get("scope"))

    def handle_data(self, data):
        for tag in self._texts:
            self._texts[tag] += data

    def handle_endtag(self, tag):
        self._last[tag] = text = self._texts.pop(tag, "")
        if tag in ("td", "th"):
            self.rows[-1].append(text)
        elif tag == "li":
            self.items.append(text)
        elif tag == "summary":
            self.terms[text] = {}
        elif tag == "dd":
            self.terms[self._last["summary"]][self._last["dt"]] = text


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "page.html"
    comparison().to_html(path)
    return path


def expected_rows(table):
    return [list(table.header), *map(list, table.rows)]


# ---------------------------------------------------------------------------------------------------------------------
# The text.


@pytest.mark.parametrize("reference", [True, False])
def test_every_cell_of_the_table_is_there(reference):
    result = comparison(reference)
    found = Page(page(result))
    assert found.rows == expected_rows(result.table)
    assert found.scopes == ["col"] * len(result.table.header) + ["row"] * 3
    assert [tag for tag, _ in found.tags].count("caption") == 1


def test_the_page_needs_nothing_else():
    text = page(comparison())
    found = Page(text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    assert "://" not in text
    assert "@import" not in text
    references = set(re.findall(r'(?:href="|url\(|src=")([^")]*)', text))
    assert references
    assert {name[0] for name in references} == {"#"}
    assert {name[1:] for name in references} <= set(found.ids)
    metas = [attributes for tag, attributes in found.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in metas
    assert "prefers-color-scheme:dark" in text


def test_ids_are_the_page_s_own_and_the_text_is_the_same_each_time():
    first, second = page(comparison()), page(comparison())
    assert first == second
    ids = Page(first).ids
    assert len(ids) == len(set(ids))


def test_nothing_global_changes():
    before = dict(rcParams)
    page(comparison())
    assert dict(rcParams) == before


def test_pictures_have_words():
    found = Page(page(comparison()))
    svgs = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(svgs) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in svgs)
    assert "width" not in svgs[0]  # they are as wide as the page lets them
    words = page(comparison())
    assert words.count(">mean-field &amp; &lt;b&gt;<") >= 4  # text, once a picture, and not an element


def test_names_and_notes_are_text():
    found = Page(page(comparison()))
    assert "b" not in {tag for tag, _ in found.tags}
    assert found.items[-2:] == list(comparison().notes)


def test_each_number_says_where_it_comes_from():
    terms = Page(page(comparison())).terms
    assert list(terms) == ["flow", "mean-field & <b>", "costs $5$ or $6$", "reference"]
    flow = terms["flow"]
    assert (flow["method"], flow["K"], flow["seed"], flow["chunks"]) == ("importance sampling", "100", "7", "[4, 500]")
    assert flow["sha256: data"] == "d" * 64
    assert flow["versions: torch"] == "2.5"
    assert (flow["device"], flow["model"]) == ("cpu", "VAE<2>")
    assert "data" not in flow  # the data set says nothing of itself


def test_runs_have_a_line_each():
    row = ComparisonRow("twice", (log_marginal([-1.0, -2.0]), log_marginal([-1.1, -2.2])), 0, 0.0, None)
    terms = Page(page(lvm.Comparison((row,), "elbo", None, ()))).terms
    assert list(terms) == ["twice, run 1", "twice, run 2"]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts.


def one(record, reference=None, *others):
    rows = [ComparisonRow(f"row {i}", (run,), 0, 0.0, None) for i, run in enumerate((record, *others))]
    result = lvm.Comparison(tuple(rows), "elbo", reference, ())
    return verdict(result, rows[-1])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (log_marginal([-1.0, -2.0], status="exact"), "log p(x) = -1.500 is exact."),
        (
            log_marginal([-1.0, -2.0], status="zero_variance"),
            "log p(x) = -1.500 may be quoted if the guide covers the whole posterior.",
        ),
        (
            log_marginal([-1.0, -2.0], stderr=0.1, bias=-0.001),
            "log p-hat = -1.500 \u00b1 0.07 may be quoted, and no fault was found, but a mode that the guide misses is "
            "not seen.",
        ),
        (
            log_marginal([-1.0, -2.0], stderr=0.1, bias=-0.1),
            "log p-hat = -1.500 (bias -0.1) may be quoted with its bias, which a \u00b1 would hide, and no fault was "
            "found, but a mode that the guide misses is not seen.",
        ),
        (
            log_marginal([-1.0, -2.0], status=["exact", "heavy_tail"], stderr=0.1),
            "log p-hat = -1.500 \u00b1 0.07 may be quoted, and its error is optimistic for the 50.0% with heavy tails.",
        ),
        (
            log_marginal([-1.0, -2.0], status=["no_fault_found", "disagreement"], stderr=0.1),
            "log p-hat = -1.500 \u00b1 0.07 may be quoted, with the mass of all its guides, which disagree on 50.0% of "
            "the data, but mass that none of them proposes is not seen.",
        ),
        (
            log_marginal([-1.0, -2.0], [-3.0, -4.0], status=["no_fault_found", "unreliable"], stderr=0.1),
            "log p-hat is not to be quoted as log p(x), for it is unreliable for 50.0% of the data, and likely too low "
            "there; the ELBO, -3.500, may be quoted as a lower bound.",
        ),
        (
            log_marginal([-math.inf, -2.0], status=["no_support", "no_fault_found"]),
            "log p-hat is not to be quoted as log p(x), for it is no_support for 50.0% of the data.",
        ),
    ],
    ids=["exact", "equal weights", "error", "bias", "heavy tail", "disagreement", "unreliable", "no support"],
)
def test_what_may_be_quoted(record, words):
    assert one(record) == f"ranked first; {words}"


def test_the_rank_with_its_error():
    # Differences of -1 and -3: -2 in the mean, with a standard error of 1, which two of them reach.
    assert one(log_marginal([0.0, 0.0]), None, log_marginal([-1.0, -3.0])).startswith(
        "ELBO 2.000 \u00b1 1 nats below that of row 0, which does not tell them apart; "
    )
    clear = one(log_marginal([0.0, 0.0]), None, log_marginal([-1.9, -2.1]))
    assert clear.startswith("ELBO 2.000 \u00b1 0.1 nats below that of row 0; ")
    assert one(log_marginal([0.0]), None, log_marginal([-1.0])).startswith("ELBO 1.000 nats below that of row 0; ")


@pytest.mark.parametrize(("error", "tells"), [(0.2, True), (0.4, False)])
def test_the_rank_of_joint_results_with_the_errors_of_their_draws(error, tells):
    rows = []
    for i, value in enumerate((0.0, -1.0)):
        record = log_marginal([value])
        record.elbo_stderr.fill_(error)  # of the difference root two times as much: two of 0.28 do not reach 1
        record = replace(record, provenance=record.provenance | {"data_plate": None, "num_data": 6})
        rows.append(ComparisonRow(f"row {i}", (record,), 0, 0.0, None))
    result = lvm.Comparison(tuple(rows), "elbo", None, ())
    words = f"ELBO 1.000 \u00b1 {error * 2**0.5:.2g} nats below that of row 0"
    assert verdict(result, rows[1]).startswith(words + ("; " if tells else ", which does not tell them apart; "))
    assert "nats in all, higher is better" in page(result)
    assert "nats per datum, higher is better" in page(comparison())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ([-1.0, -1.0], "log p-hat lies 1.000 nats below the reference"),
        ([-3.0, -3.0], "log p-hat lies 1.000 nats above the reference"),
        ([-2.1, -2.1], "log p-hat agrees with the reference"),  # the errors of the draws are 0.1 / sqrt(2)
        ([0.0, -3.5], "log p-hat agrees with the reference"),  # the data differ by more than their mean
    ],
)
def test_the_reference(reference, words):
    value = one(log_marginal([-2.0, -2.0], stderr=0.1), log_marginal(reference, status="exact"))
    assert value.endswith(f"; {words}.")
    below = "log p-hat = -2.000 \u00b1 0.07 is not to be quoted as log p(x), which is larger; " in value
    assert below is ("below" in words)


def test_the_reference_has_a_verdict():
    result = comparison()
    items = Page(page(result)).items
    assert items[:4] == [f"{row.name}: {verdict(result, row)}" for row in result.rows] + ["the reference: exact."]
    assert len([item for item in Page(page(comparison(False))).items if item.startswith("the reference")]) == 0


def test_half_precision_is_mentioned():
    record = log_marginal([-1.0, -2.0], stderr=0.001)
    record.provenance["model_dtype"] = {"dtype": "torch.bfloat16", "rms_log_p": 0.2, "mean_log_p": -0.1}
    try:
        assert one(record).endswith("; bfloat16 moves log p-hat of a datum by 0.2 nats, the mean by -0.1.")
    finally:
        del record.provenance["model_dtype"]


def test_rows_that_are_not_finite_have_a_page():
    bad = log_marginal([math.nan, -1.0], status="nonfinite", stderr=math.nan, bias=math.nan, khat=math.nan)
    rows = (
        ComparisonRow("bad", (bad,), 0, 0.0, None),
        ComparisonRow("good", (log_marginal([-1.0, -2.0]),), 0, 0.0, None),
    )
    result = lvm.Comparison(rows, "value", None, ())
    assert Page(page(result)).rows == expected_rows(result.table)


# ---------------------------------------------------------------------------------------------------------------------
# The file.


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_path_of_either_kind_and_over_what_was_there(tmp_path, kind):
    path = tmp_path / "page.html"
    path.write_text("old")
    comparison().to_html(kind(path))
    assert path.read_text(encoding="utf-8") == page(comparison())
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(lvm.CheckpointError, match="path: expected a file that can be written.*Make its folder first"):
        comparison().to_html(tmp_path / "none" / "page.html")
    with pytest.raises(lvm.CheckpointError, match="IsADirectoryError"):
        comparison().to_html(tmp_path)
    with pytest.raises(lvm.DataTypeError, match="path: expected the path of a file"):
        comparison().to_html(3)


def test_a_disk_that_is_full_leaves_the_old_page(path, monkeypatch):
    before = path.read_text(encoding="utf-8")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(lvm.CheckpointError, match="No space left on device"):
        comparison(False).to_html(path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser.


@in_a_browser
def test_the_browser_reads_what_was_written(path):
    found = Page(browser.dump_dom(path))
    assert found.rows == expected_rows(comparison().table)
    assert found.items[-2:] == list(comparison().notes)
    assert found.terms["flow"]["seed"] == "7"


@in_a_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page_does_not_scroll_sideways(path, width):
    assert browser.overflow(path, width) == 0


@in_a_browser
def test_nor_does_that_of_long_names(tmp_path):
    rows = tuple(ComparisonRow(n, (log_marginal([-1.0, -2.0]),), 0, 0.0, None) for n in ("x" * 80, "many words " * 9))
    path = tmp_path / "page.html"
    lvm.Comparison(rows, "elbo", None, ("y" * 200,)).to_html(path)
    assert browser.overflow(path, WIDTHS["phone"]) == 0


@in_a_browser
def test_the_browser_tells_a_page_that_is_too_wide(tmp_path):
    path = tmp_path / "wide.html"
    path.write_text('<!doctype html><body style="margin:0"><div style="width:450px">wide</div></body>')
    assert browser.overflow(path, 390) == 60


LETTERS = """[...page.querySelectorAll("svg text")].map(text => {
    const own = text.getBoundingClientRect(), svg = text.ownerSVGElement.getBoundingClientRect();
    return [parseFloat(text.style.fontSize) * text.getScreenCTM().a,
            Math.min(own.left - svg.left, svg.right - own.right, own.top - svg.top, svg.bottom - own.bottom)];
})"""


@in_a_browser
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_letters_in_pictures_are_legible_and_whole(path, width):
    found = browser.evaluate(path, width, LETTERS)
    assert len(found) > 40  # names, ticks, labels and legends of four pictures
    sizes, distances = zip(*found, strict=True)
    assert min(sizes) >= 9  # pixels
    assert min(distances) >= 0  # from the edge of the picture, with the fonts that the browser has


@in_a_browser
def test_both_schemes(path, tmp_path):
    from matplotlib.image import imread

    corners = []
    for dark in (False, True):
        browser.screenshot(path, tmp_path / "page.png", 390, 300, dark=dark)
        corners.append(float(np.mean(imread(tmp_path / "page.png")[:5, :5, :3])))
    assert corners[0] == 1.0
    assert corners[1] < 0.2


@in_a_browser
def test_a_browser_that_hangs_is_ended(path, monkeypatch):
    monkeypatch.setattr(browser, "SECONDS", 0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        browser.dump_dom(path)


def test_without_a_browser_it_is_said(path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert browser.find() is None
    with pytest.raises(RuntimeError, match="chromium.* is on PATH"):
        browser.dump_dom(path)
