"""Rows of measurements on paper: tables of Markdown, CSV, JSON, and pictures.

Rows come from `bench.py`.  They are written as they are measured, but for JSON, which is one array;
CSV leaves out lists.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgellama.bench import Row, test_name
from edgellama.errors import UsageError

FORMATS = ("md", "csv", "json", "jsonl")
_PICTURES = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a Markdown table; a negative width stands on the left."""

    title: str
    width: int
    text: Callable[[Row], str]


def _number(key: str, digits: int, factor: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else f"{row[key] * factor:.{digits}f}"


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def _size(row: Row) -> str:
    mib = row["model_size"] / (1 << 20)
    return f"{mib:.2f} MiB" if mib < 1024 else f"{mib / 1024:.2f} GiB"


def _params(row: Row) -> str:
    n = row["model_n_params"]
    return f"{n / 1e6:.2f} M" if n < 1e9 else f"{n / 1e9:.2f} B"


_MODEL = (
    Column("model", -30, _plain("model_type")),
    Column("size", 10, _size),
    Column("params", 10, _params),
    Column("backend", -10, _plain("backends")),
    Column("threads", 7, _plain("n_threads")),
)
_SETTINGS = (  # shown where they are not the default
    Column("n_batch", 7, _plain("n_batch")),
    Column("n_ubatch", 8, _plain("n_ubatch")),
    Column("type_k", 6, _plain("type_k")),
    Column("type_v", 6, _plain("type_v")),
)
_RESULT = (
    Column("test", 15, lambda row: test_name(row["n_prompt"], row["n_gen"], row["n_depth"])),
    Column("t/s", 20, lambda row: f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}"),
    Column("GB/s", 6, _number("read_gb_s", 1)),
    Column("GMAC/s", 6, _number("gmac_s", 1)),
    Column("% of ceiling", 12, _number("ceiling_share", 0, 100)),
    Column("peak MiB", 8, _number("peak_nbytes", 0, 1 / (1 << 20))),
    Column("first token s", 13, _number("first_token_s", 2)),
)
_PROFILE = (
    Column("threads", 7, _plain("n_threads")),
    Column("test", 15, _plain("test")),
    Column("operation", -20, _plain("operation")),
    Column("count", 5, _plain("count")),
    Column("us", 10, _number("total_us", 1)),
    Column("% of time", 9, _number("time_share", 1, 100)),
    Column("GMAC/s", 6, _number("gmac_s", 1)),
    Column("GB/s", 6, _number("read_gb_s", 1)),
    Column("% of ceiling", 12, _number("ceiling_share", 0, 100)),
)


def bench_columns(unusual: Iterable[str]) -> list[Column]:
    """Columns of llama-bench's table and then our own; `unusual` settings are shown too."""
    shown = set(unusual)
    return [*_MODEL, *(c for c in _SETTINGS if c.title in shown), *_RESULT]


def profile_columns() -> list[Column]:
    """Columns of the table of operations."""
    return list(_PROFILE)


# --- tables ---------------------------------------------------------------------------------------
def lines(rows: Iterable[Row], format_name: str, columns: Sequence[Column]) -> Iterator[str]:
    """Write rows in one of `FORMATS`; nothing comes out before the first row."""
    if format_name == "json":
        yield json.dumps(list(rows), indent=2, ensure_ascii=False)
        return
    is_first = True
    for row in rows:
        if format_name == "md":
            if is_first:
                yield _line(_pad(column.title, column.width) for column in columns)
                yield _line(_rule(column.width) for column in columns)
            yield _line(_pad(column.text(row), column.width) for column in columns)
        elif format_name == "csv":
            flat = {key: value for key, value in row.items() if not isinstance(value, list)}
            if is_first:
                yield _csv(flat)
            yield _csv("" if value is None else value for value in flat.values())
        else:
            yield json.dumps(row, ensure_ascii=False)
        is_first = False


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pad(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _rule(width: int) -> str:
    return "-" * (abs(width) - 1) + ("-" if width < 0 else ":")


def _csv(values: Iterable[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="").writerow(values)
    return out.getvalue()


# --- pictures -------------------------------------------------------------------------------------
def check_picture(path: Path) -> None:
    """Raise UsageError when `plot` could not write this picture."""
    if path.suffix.lower() not in _PICTURES:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(_PICTURES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install 'edgellama[plot]'")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens per second against depth, and the tests under the machine's roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, roof = figure.subplots(1, 2)
    figure.suptitle(f"{rows[0]['model_type']} on {rows[0]['cpu_info']}")
    series: dict[str, list[Row]] = {}
    for row in rows:
        label = f"{test_name(row['n_prompt'], row['n_gen'], 0)}, threads {row['n_threads']}"
        if len({r["type_k"] for r in rows}) > 1:
            label += f", {row['type_k']}"
        series.setdefault(label, []).append(row)
    for label, points in series.items():
        points.sort(key=lambda row: row["n_depth"])
        speed.errorbar(
            [row["n_depth"] for row in points], [row["avg_ts"] for row in points],
            [row["stddev_ts"] for row in points], marker="o", capsize=3, label=label,
        )  # fmt: skip
        roof.plot(
            [row["macs"] / row["read_nbytes"] for row in points],
            [row["macs"] / row["avg_ns"] for row in points], "o", label=label,
        )  # fmt: skip
    speed.set(xlabel="context depth, tokens", ylabel="tokens/s", yscale="log")
    speed.legend()
    intensity = [row["macs"] / row["read_nbytes"] for row in rows]
    ends = (min(0.1, *intensity) / 2, max(1000.0, *intensity) * 2)
    for n_threads in sorted({row["n_threads"] for row in rows}):
        row = next(row for row in rows if row["n_threads"] == n_threads)
        for form, name in (("f32", "f32"), ("q8", "u8 x i8")):
            top = row[f"ceiling_{form}_gmac_s"]
            corner = top / row["ceiling_read_gb_s"]
            xs = [ends[0], corner, ends[1]]
            roof.plot(xs, [xs[0] * row["ceiling_read_gb_s"], top, top], color="0.6", lw=1)
            roof.annotate(f"{name}, threads {n_threads}", (ends[1], top), ha="right", va="bottom")
    roof.set(xlabel="multiply-adds per byte", ylabel="GMAC/s", xscale="log", yscale="log")
    figure.savefig(path)
