"""Text of others in terminals, Markdown and tables."""

import csv
import io

import pytest

from dyntune.core.texts import for_csv, for_markdown, for_markdown_code, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("日本 é [red] {x}", "日本 é [red] {x}"),
        ("caf\udce9", r"caf\xe9"),
        ("a\nb\tc", r"a\x0ab\x09c"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("lone \ud800", r"lone \ud800"),
        ("turned \u202egnp", r"turned \u202egnp"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_a_cell_of_markdown_stays_one():
    assert for_markdown("a|b <i> [x](y)") == r"a\|b \<i\> \[x\](y)"
    assert for_markdown("vit_mini _x_ *y*") == r"vit_mini \_x\_ \*y\*"
    assert for_markdown("dyt:rate=0.5, 2.0 (x)") == "dyt:rate=0.5, 2.0 (x)"
    assert for_markdown_code("a|b") == r"`a\|b`" and for_markdown_code("a`b") == "`` a`b ``"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "dyt:rate=0.5"])
def test_a_cell_of_csv_is_no_formula(text):
    file = io.StringIO()
    csv.writer(file).writerow([for_csv(text)])
    assert file.getvalue()[0] not in "=+-@" and text in file.getvalue()
