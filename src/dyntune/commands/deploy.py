"""``dyntune deploy``: the former name of ``dyntune export``."""

import functools
from typing import Any

from dyntune.commands import export
from dyntune.commands.console import err

EXAMPLES = export.EXAMPLES
HIDDEN = True


@functools.wraps(export.command)
def command(**options: Any) -> None:
    """As ``dyntune export``."""
    err.print("dyntune deploy is now called dyntune export")
    export.command(**options)
