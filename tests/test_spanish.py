"""What is there in Spanish has the headings, the anchors and the code of the English original."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAIRS = [("docs/lecture.md", "docs/es/lecture.md"), ("README.md", "README.es.md")]
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.parametrize(("english", "spanish"), PAIRS)


def texts(*names):
    return [(ROOT / name).read_text(encoding="utf-8") for name in names]


def test_the_code_is_the_same(english, spanish):
    ours, theirs = (BLOCK.findall(text) for text in texts(english, spanish))
    assert ours
    assert theirs == ours


def test_headings_have_the_same_levels_and_other_words(english, spanish):
    ours, theirs = (re.findall(r"^(#+) (.+)$", BLOCK.sub("", text), re.MULTILINE) for text in texts(english, spanish))
    assert [marks for marks, _ in theirs] == [marks for marks, _ in ours]
    assert len({words for _, words in ours} & {words for _, words in theirs}) <= 1  # the name of the package


def test_formulas_and_anchors_are_the_same(english, spanish):
    ours, theirs = (BLOCK.sub("", text) for text in texts(english, spanish))
    for pattern in (r"^\$\$.*?\$\$", r"^\((?:es-)?([\w-]+)\)=$"):  # two pages cannot have one anchor: (es-l1)=
        found = [re.findall(pattern, text, re.DOTALL | re.MULTILINE) for text in (ours, theirs)]
        assert found[0] == found[1]


def test_boxes_lists_and_tables_are_all_there(english, spanish):
    ours, theirs = (BLOCK.sub("", text) for text in texts(english, spanish))
    for pattern in (r"^:::\{admonition\}", r"^\|", r"^- "):
        counts = [len(re.findall(pattern, text, re.MULTILINE)) for text in (ours, theirs)]
        assert counts[0] == counts[1], pattern


def test_links_lead_to_the_same_pages(english, spanish):
    def targets(text):
        found = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text))
        return sorted(re.sub(r"(^#|docs/)(es[-/])?", r"\1", target).replace("README.es", "README") for target in found)

    ours, theirs = map(targets, texts(english, spanish))
    assert set(theirs) == set(ours)
