"""Stop strings on a stream: text is held back as long as it may still turn into one."""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.errors import UsageError


class StopStrings:
    """Feeds text through; nothing of a stop string, nor what follows it, ever comes out."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str):
            stops = [stops]
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError("a stop string is empty; give at least one character")
        self._stops = list(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Return what can safely be shown."""
        if self.stopped:
            return ""
        self._held += text
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if found:  # the one complete first, however the text was cut into pieces
            self.stopped = True
            out, self._held = self._held[: min(found)[1]], ""
            return out
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """Return what was held back when no more text comes."""
        out, self._held = self._held, ""
        return out


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
