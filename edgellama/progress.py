"""A progress bar on stderr, shown only on a terminal and only when something lasts over a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_DELAY_S = 1.0


@contextmanager
def progress(title: str, total: int | None, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`; `total` and `n` are bytes when `unit` is "B", otherwise a plain count."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    lock = threading.Lock()
    state = {"done": 0, "bar": None, "task": None}
    start = time.monotonic()

    def open_bar() -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TimeRemainingColumn,
        )

        count = DownloadColumn() if unit == "B" else MofNCompleteColumn()
        bar = Progress(
            "{task.description}", BarColumn(), count, TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        bar.start()
        state["bar"], state["task"] = bar, bar.add_task(title, total=total)  # type: ignore[assignment]

    def advance(n: int) -> None:
        with lock:
            state["done"] += n  # type: ignore[operator]
            if state["bar"] is None and time.monotonic() - start > _DELAY_S:
                open_bar()
            if state["bar"] is not None:
                state["bar"].update(state["task"], completed=state["done"])  # type: ignore[attr-defined]

    try:
        yield advance
    finally:
        if state["bar"] is not None:
            state["bar"].stop()  # type: ignore[attr-defined]
