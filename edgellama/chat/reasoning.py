"""Reasoning of a model before its answer: split off as it streams.

It stands at the very beginning of what the model says; the template may have written its opening mark
already.  The same mark later in an answer is text.
"""

from __future__ import annotations

from typing import NamedTuple

from edgellama.stopping import overlap


class Marks(NamedTuple):
    """What stands before and after reasoning."""

    opening: str
    closing: str


MARKS = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
)


class ReasoningReader:
    """Tells reasoning from text; with `is_open`, the opening mark stands in the prompt."""

    def __init__(self, marks: Marks, is_open: bool) -> None:
        self._marks = marks
        self._state = "inside" if is_open else "start"
        self._held = ""
        self._begun = False  # whether anything but white space came, of the part that we are in

    def feed(self, text: str) -> tuple[str, str]:
        """Return (reasoning, text) that is certain; both come without white space around."""
        self._held += text
        reasoning = ""
        if self._state == "start":
            seen = self._held.lstrip()
            if seen.startswith(self._marks.opening):
                self._state, self._held = "inside", seen[len(self._marks.opening) :]
            elif self._marks.opening.startswith(seen):
                return "", ""
            else:
                self._state, self._begun = "text", True
        if self._state == "inside":
            head, mark, rest = self._held.partition(self._marks.closing)
            if not mark:
                return self._take(len(head) - overlap(head, self._marks.closing)), ""
            reasoning = self._take(len(head))
            self._state, self._held, self._begun = "text", rest, False
        if not self._begun:
            self._held = self._held.lstrip()
        self._begun = self._begun or bool(self._held)
        out, self._held = self._held, ""
        return reasoning, out

    def _take(self, n: int) -> str:
        """Return reasoning from the first `n` characters held; white space at their end may be its end."""
        out = self._held[:n].rstrip()
        self._held = self._held[len(out) :]
        if not self._begun:
            out = out.lstrip()
            self._begun = bool(out)
        return out

    def flush(self) -> tuple[str, str]:
        """Return what was held back when no more comes."""
        out, self._held = self._held, ""
        return (
            (out.strip() if not self._begun else out.rstrip(), "")
            if self._state == "inside"
            else ("", out)
        )
