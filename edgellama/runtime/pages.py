"""The pages of one layer group: layers that see equally far back, and so need the same positions.

A page is 32 positions of every layer and KV head of the group.  Pages that nobody uses but that are
known by a hash are kept for whoever begins with the same tokens, the least recently used going first.
Bytes and their layout: `kernels/kv.py`.  Whose they are: `kvcache.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from edgellama.errors import ContextOverflowError, OutOfMemoryError
from edgellama.kernels.layout import PAGE, kv_page_nbytes

from .memory import small_pages


class Pages:
    """`n_pages` pages for layers that see `window` positions (0: all).

    At most `n_most_idle` of them are kept for prefixes.  `on_forget` hears of every hash that is no longer
    known.  Raises: OutOfMemoryError.
    """

    def __init__(
        self,
        *,
        window: int,
        n_layers: int,
        n_kv_heads: int,
        head_size: int,
        kv_type: str,
        n_pages: int,
        n_most_idle: int,
        on_forget: Callable[[bytes], None],
    ) -> None:
        self.window = window
        self.n_pages = n_pages
        self.page_nbytes = kv_page_nbytes(kv_type, head_size)  # of one head
        self.head_nbytes = n_pages * self.page_nbytes
        self.layer_nbytes = n_kv_heads * self.head_nbytes
        nbytes = n_layers * self.layer_nbytes
        try:
            memory = small_pages(nbytes)
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"a KV cache of {nbytes / 1e6:.0f} MB could not be had; use a smaller context (-c)"
            ) from error
        self.address = memory.ctypes.data
        self.bytes = memory.reshape(-1, n_pages, self.page_nbytes)  # (L * K, n_pages, page)
        self._n_most_idle = n_most_idle
        self._on_forget = on_forget
        self._free = list(range(n_pages - 1, -1, -1))
        self._n_users = [0] * n_pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages nobody uses, oldest first

    def first_seen(self, position: int) -> int:
        """The first page that a token at a position sees."""
        return max(0, position + 1 - self.window) // PAGE if self.window else 0

    def find(self, key: bytes) -> int | None:
        """The page that is known by a hash."""
        return self._by_key.get(key)

    def know(self, page: int, key: bytes) -> None:
        """Make a page known by a hash, unless another is."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key] = page
            self._key_of[page] = key

    def is_free_to_know(self, page: int) -> bool:
        """Say whether a page has one user and is not known."""
        return self._n_users[page] == 1 and page not in self._key_of

    def take(self) -> int:
        """Return a page that is used by one and not known.

        Raises: ContextOverflowError.
        """
        if self._free and len(self._idle) <= self._n_most_idle:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            raise ContextOverflowError(
                f"all {self.n_pages * PAGE} positions of the KV cache are in use; "
                "close other sequences or open the model with a larger n_ctx"
            )
        self._n_users[page] = 1
        return page

    def use(self, page: int) -> int:
        """Count one more user of a page; return it."""
        self._n_users[page] += 1
        self._idle.pop(page, None)
        return page

    def release(self, page: int) -> None:
        """Count one user less."""
        self._n_users[page] -= 1
        if self._n_users[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def copy(self, page: int) -> int:
        """Return a page of the same that may be written: a new one, or this one if there is no other.

        Raises: ContextOverflowError.
        """
        self.use(page)  # so that it is not the one that is taken
        try:
            own = self.take()
        except ContextOverflowError:
            if self._n_users[page] == 1:
                self._forget(page)
                return page
            self.release(page)
            raise
        self.release(page)
        self.bytes[:, own] = self.bytes[:, page]
        return own

    def own(self, page: int) -> int:
        """Return a page of the same that may be written: no other sequence sees it, no hash knows it."""
        if self._n_users[page] > 1:
            own = self.copy(page)
            self.release(page)
            return own
        if page in self._key_of:
            self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page)
        del self._by_key[key]
        self._on_forget(key)
