from pyro_lvm.table import TextTable

TABLE = TextTable(("pair", "ELBO"), (("a<b", "-1.0"), ("long name", "-10.25")), ("a note",))


def test_text_is_aligned():
    assert str(TABLE).splitlines() == [
        "pair         ELBO",
        "---------  ------",
        "a<b          -1.0",
        "long name  -10.25",
        "a note",
    ]


def test_markdown():
    assert TABLE.to_markdown().splitlines() == [
        "| pair | ELBO |",
        "| --- | ---: |",
        "| a<b | -1.0 |",
        "| long name | -10.25 |",
        "",
        "- a note",
    ]


def test_html_is_escaped():
    html = TABLE.to_html()
    assert "<td>a&lt;b</td><td>-1.0</td>" in html
    assert "<li>a note</li>" in html
