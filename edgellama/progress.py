"""A progress bar on stderr, shown only on a terminal and only when something lasts over a second.

Rich is imported when the bar appears, so that what is quick pays nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_DELAY_S = 1.0


class _Bar:
    """Counts, and becomes visible once `_DELAY_S` has passed; any thread may advance it."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.rich: Progress | None = None

    def advance(self, n: int, title: str = "") -> None:
        with self.lock:
            self.done += n
            self.title = title or self.title
            if self.rich is None and time.monotonic() - self.start > _DELAY_S:
                self.rich = self._show()
            if self.rich is not None:
                self.rich.update(
                    self.rich.task_ids[0], completed=self.done, description=_plain(self.title)
                )

    def _show(self) -> Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TimeRemainingColumn,
        )

        bar = Progress(
            "{task.description}",
            BarColumn(),
            DownloadColumn() if self.unit == "B" else MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        bar.add_task(_plain(self.title), total=self.total)
        bar.start()
        return bar


def _plain(title: str) -> str:
    """A title in which brackets are not markup."""
    return title.replace("[", r"\[")


class Advance(Protocol):
    """Counts `n` more; a `title` replaces the one before it."""

    def __call__(self, n: int, title: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    """Yield `advance(n)`; `total` and `n` are bytes when `unit` is "B", otherwise a plain count."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda n, title="": None
        return
    bar = _Bar(title, total, unit)
    try:
        yield bar.advance
    finally:
        if bar.rich is not None:
            bar.rich.stop()
