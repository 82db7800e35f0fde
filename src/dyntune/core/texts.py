"""Text that comes from others, names of files and classes above all, made fit for what it is written into."""

from __future__ import annotations

import re
from collections.abc import Sequence

# An underscore within a word means nothing.
_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|~$&]|(?<!\w)_|_(?!\w))")


def printable(text: str) -> str:
    r"""The text on one line, as any terminal, file or picture can show it.

    Bytes of a file's name that are not UTF-8, which Python keeps as lone surrogates, become ``\xe9`` and so on, and so
    do line breaks, escape sequences and other signs that print nothing but do something.
    """
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if _lone(text) else text
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of several names, fit to be printed, and how many more there are."""
    shown = ", ".join(map(printable, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def _lone(text: str) -> bool:
    """Whether there are bytes of a name that are not UTF-8, and no other half of a pair, which stands for no byte."""
    surrogates = [sign for sign in text if "\ud800" <= sign <= "\udfff"]
    return bool(surrogates) and all("\udc80" <= sign <= "\udcff" for sign in surrogates)


def _escaped(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode() if ord(sign) > 0x7F else f"\\x{ord(sign):02x}"


def for_markdown(text: str) -> str:
    """The text as words of a paragraph or cell in Markdown, where none of its signs means anything."""
    return _MARKDOWN.sub(r"\\\1", printable(text))


def for_markdown_code(text: str) -> str:
    """The text as code in a cell of a table in Markdown."""
    text = printable(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def for_csv(text: str) -> str:
    """The text as a cell of a CSV file, which no spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
