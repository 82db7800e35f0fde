"""The report of a comparison: a table for people, files for programs, pictures, and a page that shows them."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dyntune.core.files import write_atomically, write_json, write_text
from dyntune.core.machine import machine
from dyntune.core.texts import for_csv, for_markdown, for_markdown_code
from dyntune.data.base import LabelledImages
from dyntune.model.tuned import TunedModel
from dyntune.parts.spec_list import folder_name
from dyntune.studies import pictures
from dyntune.studies.compare import Row
from dyntune.training.evaluate import as_tensors
from dyntune.training.settings import TrainSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GATED, _REDUCED = 6, 2
"""Images in a picture of gates, and of merged or dropped tokens."""
_SPEED = "Speed is relative to the untouched backbone, run in turns in one process."
_COLUMNS = (
    "trained parameters",
    "adapter",
    "MACs per {per}",
    "of dense",
    "active",
)
_SPEED_COLUMNS = ("img/s", "speed")


@dataclass(frozen=True)
class Table:
    """A table beside that of the methods.

    Args:
        title: what it shows.
        columns: titles of the columns.
        rows: cells as people read them; the first names the row.
        note: what was measured, and on what.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str


def table_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The titles of the columns of ``table_rows``."""
    columns = (column.format(per=rows[0].per) for column in _COLUMNS)
    return ("method", f"test {rows[0].test.merit}", *columns, *(_SPEED_COLUMNS if rows[0].speed else ()))


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The rows as people read them, under ``table_columns``."""
    return [
        (
            row.method,
            f"{row.test.score:.2%}",
            f"{row.trainable_params:,}",
            f"{row.adapter_bytes / 1000:,.0f} kB",
            f"{(row.test.macs or 0) / 1e6:,.2f} M",
            f"{(row.test.macs or 0) / row.dense_macs:.1%}",
            f"{row.test.activation:.1%}" if row.test.activation_per_unit else "-",
            *((f"{row.speed.images_per_second:,.0f}", f"{row.speed.speedup:.2f} x") if row.speed else ()),
        )
        for row in rows
    ]


def methods_table(rows: Sequence[Row]) -> Table:
    """The rows of a comparison as people read them."""
    note = f"Measured on {machine()}.{f' {_SPEED}' if rows[0].speed else ''}"
    return Table("Methods", table_columns(rows), table_rows(rows), note)


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "| --- |" + " ---: |" * (len(table.columns) - 1)]
    lines += ["| " + " | ".join((for_markdown_code(name), *cells)) + " |" for name, *cells in table.rows]
    return "\n".join(lines)


def trained_with(data: str, model: str, weights: Path | None, settings: TrainSettings) -> dict[str, Any]:
    """What the methods of a comparison were trained on, from and with, as JSON values.

    Args:
        data: as it was named.
        model: name of the backbone.
        weights: local weight file of the backbone, of which the name is told and not the place.
        settings: of every run; what decides the outcome is told.
    """
    file = None if weights is None else weights.name
    return {"data": data, "model": model, "weights": file, "settings": settings.deciding()}


def write_report(
    out: Path,
    title: str,
    intro: str,
    rows: Sequence[Row],
    models: dict[str, TunedModel],
    images: LabelledImages,
    *further: Table,
    trained: Mapping[str, Any],
) -> Path:
    """Writes table, pictures and page of a comparison.

    Args:
        out: folder for ``results.json``, ``results.csv``, ``results.md``, the pictures and ``index.html``.
        title: of the page.
        intro: one paragraph of text under the title.
        rows: a row per method.
        models: the trained models by method.
        images: where the images of the pictures are taken from.
        further: tables behind that of the methods.
        trained: see ``trained_with``; for ``results.json``.

    Returns:
        The page.
    """
    results = {"title": title, **trained, "machine": machine(), "rows": [row.to_dict() for row in rows]}
    write_json(out / "results.json", results | ({"tables": [asdict(table) for table in further]} if further else {}))
    write_atomically(out / "results.csv", lambda path: _write_csv(path, rows))
    captions = {"tradeoff.png": f"Test {rows[0].test.merit} over the MACs that ran, without the head."}
    pictures.save_figure(pictures.tradeoff_figure(rows), out / "tradeoff.png")
    gated = [row for row in rows if row.test.activation_per_unit]
    if gated:
        rates = {row.method: list(row.test.activation_per_unit.items()) for row in gated}
        targets = {row.method: models[row.method].target_rate for row in gated}
        pictures.save_figure(pictures.activation_figure(rates, targets), out / "activation.png")
        captions["activation.png"] = "Activation rate of each gated unit on the test images; dashed, the target."
    for row in rows:
        for name, (figure, text) in token_pictures(row.method, models[row.method], images).items():
            pictures.save_figure(figure, out / name)
            captions[name] = text
    methods = methods_table(rows)
    tables = "".join(f"\n## {table.title}\n\n{markdown_table(table)}\n\n{table.note}\n" for table in further)
    body = f"{for_markdown(intro)}\n\n{markdown_table(methods)}\n\n{methods.note}\n{tables}"
    write_text(
        out / "results.md",
        f"# {for_markdown(title)}\n\n{body}\n"
        + "\n\n".join(f"![{for_markdown(text)}]({file})" for file, text in captions.items())
        + "\n",
    )
    write_text(out / "index.html", _page(title, intro, (methods, *further), captions))
    return out / "index.html"


def token_pictures(method: str, model: TunedModel, images: LabelledImages) -> dict[str, tuple[Figure, str]]:
    """What a model makes of the tokens of images spread over a data set: figure and caption by name of the file."""
    if not model.policies:
        return {}
    if model.preprocessing.clip is not None:
        return _clip_pictures(method, model, images)
    picked = range(0, len(images), max(1, len(images) // _GATED))[:_GATED]
    prepared = as_tensors(images, model)
    batch = torch.stack([prepared[i][0] for i in picked]).to(next(model.parameters()).device)
    plain = [images.with_transform(None)[i][0] for i in picked]
    found = {}
    with torch.no_grad():
        output = model.eval().run(batch)
        few = model.run(batch[:_REDUCED])
    if output.gates:
        found[f"tokens-{folder_name(method)}.png"] = (
            pictures.token_figure(plain, output.gates, output.grid),
            f"Activated tokens of {method}: in each block the patches that were computed; the others skipped it.",
        )
    if few.reductions:
        found[f"reductions-{folder_name(method)}.png"] = (
            pictures.reduction_figure(plain[:_REDUCED], few),
            f"Tokens of {method}: in each block what was merged, dropped or skipped.",
        )
    return found


def _clip_pictures(method: str, model: TunedModel, videos: LabelledImages) -> dict[str, tuple[Figure, str]]:
    """As ``token_pictures``, of the frames of one clip."""
    clip = as_tensors(videos, model)[len(videos) // 2][0]
    clip = clip if clip.dim() == 4 else clip[len(clip) // 2]  # of several views the middle one
    with torch.no_grad():
        output = model.eval().run(clip[None].to(next(model.parameters()).device))
    frames, gates, grid = pictures.of_clip(clip, model.preprocessing, output, model.backbone.slices)
    if not gates:
        return {}
    figure = pictures.frames_figure(frames, gates, grid)
    return {
        f"tokens-{folder_name(method)}.png": (
            figure,
            f"Activated tokens of {method}: of each frame the patches that some of the blocks computed; the others "
            "skipped them.",
        )
    }


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "method",
                f"test_{rows[0].test.merit}",
                "trainable_params",
                "adapter_bytes",
                "macs",
                "dense_macs",
                "activation",
                "images_per_second",
                "speedup",
                "speedup_low",
                "speedup_high",
                "train_seconds",
            ]
        )
        for r in rows:
            figures = [
                r.test.score,
                r.trainable_params,
                r.adapter_bytes,
                r.test.macs,
                r.dense_macs,
                r.test.activation,
            ]
            speed = list(r.speed.to_dict().values()) if r.speed else [None] * 4
            writer.writerow([for_csv(r.method), *figures, *speed, r.train_seconds])


def _breakable(cell: str) -> str:
    """The cell as HTML, in which a long spec may be broken between its parts and options."""
    return re.sub(r"([,+])", r"\1<wbr>", html.escape(cell)) if ":" in cell else html.escape(cell)


def _page(title: str, intro: str, tables: Sequence[Table], captions: dict[str, str]) -> str:
    """One HTML page without scripts or anything from elsewhere."""
    figures = "".join(
        f'<figure><a href="{html.escape(file)}" title="open the picture by itself">'
        f'<img src="{html.escape(file)}" alt="{html.escape(text)}"></a>'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for file, text in captions.items()
    )
    first, *further = map(_html_table, tables)
    titled = [f"<h2>{html.escape(t.title)}</h2>{text}" for t, text in zip(tables[1:], further, strict=True)]
    return _TEMPLATE.format(
        title=html.escape(title), intro=html.escape(intro), tables="\n".join([first, *titled]), figures=figures
    )


def _html_table(table: Table) -> str:
    """A table as HTML; its cells know the titles of their columns, for narrow screens, where rows become lists."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-column="{html.escape(column)}"><span>{_breakable(cell)}</span></td>'
            for column, cell in zip(table.columns, cells, strict=True)
        )
        + "</tr>"
        for cells in table.rows
    )
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f'<p class="note">{html.escape(table.note)}</p>'
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #ddd; --faint: #555; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #444; --faint: #aaa; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }}
body > p {{ max-width: 60rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }}
th {{ white-space: normal; }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }}
td:first-child {{ font-family: ui-monospace, monospace; }}
h1, p, figcaption {{ overflow-wrap: anywhere; }}
figure {{ margin: 2.5rem 0; }}
img {{ display: block; box-sizing: border-box; width: 100%; height: auto; }}
img {{ padding: .5rem; background: #fff; border-radius: .4rem; }}
figcaption, .note {{ color: var(--faint); font-size: .9rem; }}
@media (max-width: 60rem) {{
  thead {{ display: none; }}
  table, tbody, tr {{ display: block; }}
  tr {{ margin: 1rem 0; border: 1px solid var(--line); border-radius: .4rem; }}
  td, td:first-child {{ display: flex; justify-content: space-between; gap: 1rem; min-width: 0; border: 0; }}
  td:first-child {{ font-weight: bold; border-bottom: 1px solid var(--line); }}
  td:not(:first-child)::before {{ content: attr(data-column); color: var(--faint); }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{intro}</p>
{tables}
{figures}
</body>
</html>
"""
