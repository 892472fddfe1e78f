"""What became of every tensor: a line for the terminal, JSON, or a page with a picture."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from math import prod
from pathlib import Path

from edgellama.errors import UsageError
from edgellama.gguf.new_file import NewFile

from .write import TensorReport

_BAR_WIDTH = 420


def summary(reports: Sequence[TensorReport]) -> str:
    """Size, bits per weight and formats, in one line."""
    n = sum(prod(r.shape) for r in reports)
    nbytes = sum(r.nbytes for r in reports)
    by_type: dict[str, int] = {}
    for r in reports:
        by_type[r.type] = by_type.get(r.type, 0) + 1
    types = ", ".join(f"{count} {name}" for name, count in by_type.items())
    return f"{nbytes / 1e6:.1f} MB, {8 * nbytes / n:.2f} bits per weight, tensors {types}"


def check_name(path: Path) -> None:
    """Raise: UsageError when a report of this name cannot be written."""
    if path.suffix.lower() not in (".json", ".html"):
        raise UsageError(f"--report {path}: the name must end in .json or .html")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--report {path}: a file in a folder that exists is needed")


def write_report(path: Path, title: str, reports: Sequence[TensorReport]) -> None:
    """Write FILE.json or FILE.html."""
    writers = {".json": _json, ".html": _html}
    new = NewFile(path, force=True)
    try:
        new.file.write(writers[path.suffix.lower()](title, reports).encode())
        new.finish()
    finally:
        new.discard()


def relative_error(report: TensorReport) -> float | None:
    """Root of the weighted squared error over that of the weights; None where copied."""
    if report.squared_error is None or not report.mean_square:
        return None
    return math.sqrt(report.squared_error / report.mean_square)


def _json(title: str, reports: Sequence[TensorReport]) -> str:
    n = sum(prod(r.shape) for r in reports)
    nbytes = sum(r.nbytes for r in reports)
    document = {
        "file": title,
        "nbytes": nbytes,
        "bits_per_weight": 8 * nbytes / n,
        "tensors": [r._asdict() | {"relative_error": relative_error(r)} for r in reports],
    }
    return json.dumps(document, indent=1)


def _html(title: str, reports: Sequence[TensorReport]) -> str:
    """A table whose bars show the bits per weight and the error of every tensor."""
    worst = max((relative_error(r) or 0.0 for r in reports), default=0.0) or 1.0
    rows = []
    for r in reports:
        error = relative_error(r)
        bits = 8 * r.nbytes / prod(r.shape)
        text = "copied" if error is None else f"{100 * error:.2f} %"
        rows.append(
            f"<tr><td>{html.escape(r.name)}<td>{'x'.join(map(str, r.shape))}"
            f"<td>{r.source_type} &rarr; {r.type}<td class=n>{r.nbytes / 1e6:.2f}"
            f"<td class=n>{bits:.2f}<td>{_bar((error or 0.0) / worst)} {text}"
        )
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:14px system-ui;margin:2em}td,th{padding:2px 10px;text-align:left}"
        "td.n{text-align:right}rect{fill:#47a}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary(reports))}</p><table>"
        "<tr><th>tensor<th>shape<th>type<th>MB<th>bits<th>relative error"
        + "\n".join(rows)
        + "</table>\n"
    )


def _bar(share: float) -> str:
    width = round(_BAR_WIDTH * share)
    return f'<svg width="{_BAR_WIDTH}" height="12"><rect width="{width}" height="10" y="1"/></svg>'
