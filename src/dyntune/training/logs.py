"""What a run writes down while it trains: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dyntune.core.files import parse_json, write_text
from dyntune.core.limits import limit, limits_named

log = logging.getLogger("dyntune")

LOG = "log.jsonl"


class RunLog:
    """Appends records to ``log.jsonl`` and TensorBoard's event files.

    Args:
        folder: the run's folder.
        steps_done: records after this step belong to work that will be done again, and are removed.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.path = folder / LOG
        kept = [r for r in read_log(folder) if r["step"] <= steps_done]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and most commands write no log

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds one record.

        Args:
            kind: ``train`` or ``val``.
            step: steps since the beginning of the run.
            values: figures; numbers go to TensorBoard too.
        """
        with limits_named():
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes what is still in memory; where that cannot be done, TensorBoard's files lack their end."""
        try:
            self.writer.close()
        except OSError as error:
            log.warning("TensorBoard's files lack their end: %s", limit(error) or error)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; what stands behind a line that was cut off, or is none of a run's, is left out."""
    path = folder / LOG
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = parse_json(line)
        except ValueError:
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records
