"""The tokens of a text as it grows, as an array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class History:
    """Token ids so far; `ids` is i64 (n,), a view that the next token may move."""

    def __init__(self, ids: Sequence[int] | np.ndarray = ()) -> None:
        self._ids = np.array(ids, np.int64)
        self._n = len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        """All tokens, i64 (n,)."""
        return self._ids[: self._n]

    def last(self, n: int) -> np.ndarray:
        """The last n tokens; -1 is all."""
        return self._ids[max(self._n - n, 0) if n >= 0 else 0 : self._n]

    def append(self, token: int) -> None:
        """Add a token."""
        if self._n == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(max(self._n, 64), np.int64)])
        self._ids[self._n] = token
        self._n += 1

    def copy(self) -> History:
        """Return a text that grows by itself."""
        return History(self.ids)
