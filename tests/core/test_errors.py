"""What libraries say, made fit for a sentence."""

import pytest

from dyntune.core.errors import in_one_line


def caused(*messages):
    """An error with that message, caused by one with the next, and so on."""
    error = RuntimeError(messages[0])
    error.__cause__ = caused(*messages[1:]) if len(messages) > 1 else None
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("not a zip archive."), "not a zip archive"),
        (caused("Failed. Next steps:\n- report it", "at step 3", "no such operator"), "no such operator"),
        (ValueError("cannot guard on u1\n\nTo fix this:\n  1. insert a check"), "cannot guard on u1"),
        (ValueError("\nfailed at reader.cpp:84:\n   unknown\tformat\n.\n"), "failed at reader.cpp:84: unknown format"),
        (ValueError("\x1b[96mstep 3\x1b[0m failed"), "step 3 failed"),
        (caused("node x: no translation", ""), "node x: no translation"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 400), "x" * 300 + " ..."),
    ],
)
def test_the_reason_alone_is_quoted(error, expected):
    assert in_one_line(error) == expected
