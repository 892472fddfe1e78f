"""The engine: runs steps of token ids and returns logits. It knows nothing of text.

A step takes up to `n_batch` tokens of one or more sequences. A native call is kept near 0.15 s by
running the table in pieces of measured length, so that Ctrl-C and `abort` are seen between them; an
interrupted step leaves every sequence as it was.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

import numpy as np

from edgellama.catalog import home
from edgellama.cpu import n_usable_cores
from edgellama.errors import (
    ContextOverflowError,
    EdgeLlamaError,
    KernelError,
    OutOfMemoryError,
    UsageError,
)
from edgellama.gguf import GGUFFile
from edgellama.kernels import layout, targets, team
from edgellama.kernels.compiler import BuildError, Pack, build, missing_objects
from edgellama.models import FAMILIES, Builder
from edgellama.models.config import ModelConfig, RopeConfig
from edgellama.progress import progress

from .kvcache import PAGE, KVCache, Sequence
from .program import Program
from .rope import rope_table
from .weights import Weights

KV_TYPES = ("f16", "f32", "q8_0")
_N_OUT = 32  # rows of logits that the arena holds; more are asked for in blocks
_CALL_S, _OPERATION_S = 0.15, 0.25
_MANY_TOKENS = 32


class Aborted(EdgeLlamaError):
    """`Engine.abort` was called while a step ran."""


class Engine:
    """A loaded model: weights, cache, threads.

    `on_loading` is called when the next thing is native: reading and packing the weights.
    Raises: UsageError for an argument out of range, KernelError when kernels cannot be built,
    OutOfMemoryError.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        config: ModelConfig,
        *,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_threads: int | None = None,
        kv_type: str = "f16",
        fuse: bool = True,
        on_loading: Callable[[], None] = lambda: None,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise UsageError(f"kv_type is {kv_type!r}; it must be one of {', '.join(KV_TYPES)}")
        for name, value in (("n_ctx", n_ctx), ("n_batch", n_batch)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if n_threads is None:
            n_threads = n_usable_cores()
        if not 1 <= n_threads <= 256:
            raise UsageError(f"n_threads is {n_threads}; it must be between 1 and 256")
        self.config = config
        self.n_vocab = config.n_vocab
        self.n_ctx = n_ctx
        self.n_batch = min(n_batch, n_ctx)
        self.n_threads = n_threads
        self._lock = threading.Lock()
        self._freed: deque[Sequence] = deque()
        self._abort = False
        self._closed = False
        self._macs_per_s = 2e9 * n_threads

        builder = Builder(config, gguf.tensors)
        program = Program(builder, FAMILIES[config.arch](builder), kv_type, fuse=fuse)
        self._pack = load_pack([*program.operations, *team.NAMES], targets.detect())
        total = sum(gguf.tensors[name].nbytes for name in program.weights)
        self._weights = Weights(gguf, program.weights, program.gathered, self.n_batch)
        scratch_nbytes = max(program.scratch_nbytes, self._weights.scratch_nbytes)
        self._team = team.Team(self._pack, n_threads, scratch_nbytes)
        weakref.finalize(self, self._team.close)  # for those who forget to
        on_loading()
        with progress("Loading weights", total) as advance:
            self._weights.load(self._pack, self._team, advance)
        n_pages = 2 * -(-n_ctx // PAGE)  # as much again, to remember earlier prefixes
        self._cache = KVCache(
            n_layers=config.n_layers,
            n_kv_heads=config.n_kv_heads,
            head_size=config.head_size,
            n_pages=n_pages,
            kv_type=kv_type,
        )
        self._ropes: dict[RopeConfig, np.ndarray] = {}
        for rope in (config.rope, config.rope_local):
            if rope is not None:
                self._ropes[rope] = rope_table(rope, gguf, n_ctx)
        try:
            self._bound = program.bind(
                self._pack,
                self._weights,
                self._cache,
                self._ropes,
                n_batch=self.n_batch,
                n_out=min(_N_OUT, self.n_batch),
            )
        except (OSError, MemoryError) as error:
            raise OutOfMemoryError(
                f"memory for a batch of {self.n_batch} tokens could not be had; use a smaller n_batch"
            ) from error
        self._pieces_cost = [record.n_macs for record in program.records]
        self.n_macs = sum(self._pieces_cost)  # of a token, without attention
        self._out_of_head = [record.of_out_rows for record in program.records]
        self._macs = np.array(
            [(r.n_macs, r.n_position_macs, r.n_positions) for r in program.records], np.float64
        ).T
        self._of_out_rows = np.array([record.of_out_rows for record in program.records])
        self._head_first = program.head_first
        self._n_records = len(program.records)
        self._team.use(self._bound.table)
        self._step = np.zeros(layout.STEP_NBYTES // 8, np.int64)
        self._ids = np.zeros(self.n_batch, np.int32)
        self._positions = np.zeros(self.n_batch, np.int32)
        self._tables = np.zeros(self.n_batch, np.int64)
        self._out_rows = np.zeros(self.n_batch, np.int32)
        for field, array in (
            (layout.STEP_IDS, self._ids),
            (layout.STEP_POSITIONS, self._positions),
            (layout.STEP_TABLES, self._tables),
            (layout.STEP_OUT_ROWS, self._out_rows),
        ):
            self._step[field // 8] = array.ctypes.data

    # --- sequences --------------------------------------------------------------------------------
    def new_sequence(self) -> Sequence:
        """Begin an empty sequence."""
        return Sequence(self.n_ctx)

    def free(self, sequence: Sequence) -> None:
        """Forget a sequence; its full pages stay known until their room is needed.

        This may come from the end of an abandoned generator, which the garbage collector chooses: also
        in the middle of a step of this very thread. So it never waits.
        """
        self._freed.append(sequence)
        if self._lock.acquire(blocking=False):
            try:
                self._forget_freed()
            finally:
                self._lock.release()

    def _forget_freed(self) -> None:
        while self._freed:
            sequence = self._freed.popleft()
            if not self._closed:
                self._cache.truncate(sequence, 0)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One step, or one change of sequences, at a time."""
        with self._lock:
            self._forget_freed()
            yield

    def truncate(self, sequence: Sequence, n_tokens: int) -> None:
        """Go back to the first `n_tokens` tokens; nothing is computed.

        Raises: UsageError when the sequence is shorter, ContextOverflowError when its last page is
        shared and there is no room for a copy.
        """
        if not 0 <= n_tokens <= len(sequence.tokens):
            raise UsageError(f"the sequence has {len(sequence.tokens)} tokens, not {n_tokens}")
        with self._locked():
            self._cache.truncate(sequence, n_tokens)

    # --- evaluation -------------------------------------------------------------------------------
    def evaluate(self, sequence: Sequence, ids: SequenceOf[int]) -> np.ndarray:
        """Append tokens to a sequence and return the logits f32 (V,) after the last one.

        An empty sequence first takes the pages that an earlier one with the same beginning left.
        Raises: ContextOverflowError, UsageError for an id outside the vocabulary.
        """
        return self.step([(sequence, ids)])[0]

    def step(self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]]) -> np.ndarray:
        """Append tokens to several sequences at once; logits f32 (n, V) after each one's last."""
        with self._locked():
            for sequence, ids in batch:
                self._check(sequence, ids)
            before = [len(sequence.tokens) for sequence, _ in batch]
            try:
                return self._evaluate(batch)
            except BaseException:
                for (sequence, _), n_tokens in zip(batch, before, strict=True):
                    self._cache.truncate(sequence, n_tokens)
                raise

    def _evaluate(self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]]) -> np.ndarray:
        logits = np.empty((len(batch), self.n_vocab), np.float32)
        pending: list[tuple[int, Sequence, SequenceOf[int]]] = []
        for i, (sequence, ids) in enumerate(batch):
            skip = 0 if sequence.tokens else self._cache.reuse_prefix(sequence, ids)
            pending.append((i, sequence, ids[skip:]))
        while pending:
            room = self._room(pending)
            taken: list[tuple[int, Sequence, SequenceOf[int], bool]] = []
            rest: list[tuple[int, Sequence, SequenceOf[int]]] = []
            for i, sequence, ids in pending:
                now, later = ids[:room], ids[room:]
                room -= len(now)
                if now:
                    taken.append((i, sequence, now, not later))
                if later:
                    rest.append((i, sequence, later))
            wanted = self._stage([(s, ids) for _, s, ids, _ in taken], [t[3] for t in taken])
            self._run(0, self._head_first)
            for _, sequence, ids, _ in taken:
                self._cache.commit(sequence, ids)
            ends = [i for i, _, _, is_end in taken if is_end]
            for first, rows in self._head(wanted):
                for i, row in zip(ends[first:], rows, strict=False):
                    logits[i] = row
            pending = rest
        return logits

    def logits(self, ids: SequenceOf[int]) -> np.ndarray:
        """Return the logits f32 (T, V) after every token of a text of its own."""
        sequence = self.new_sequence()
        try:
            return self.evaluate_each(sequence, ids)
        finally:
            self.free(sequence)

    def evaluate_each(self, sequence: Sequence, ids: SequenceOf[int]) -> np.ndarray:
        """Append tokens to a sequence and return the logits f32 (T, V) after every one of them."""
        with self._locked():
            self._check(sequence, ids)
            out = np.empty((len(ids), self.n_vocab), np.float32)
            before = len(sequence.tokens)
            try:
                start = 0
                while start < len(ids):
                    chunk = ids[start : start + self._room([(0, sequence, ids[start:])])]
                    self._stage([(sequence, chunk)], [True])
                    self._run(0, self._head_first)
                    self._cache.commit(sequence, chunk)
                    for first, rows in self._head(list(range(len(chunk)))):
                        out[start + first : start + first + len(rows)] = rows
                    start += len(chunk)
            except BaseException:
                self._cache.truncate(sequence, before)
                raise
        return out

    def _check(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        if self._closed:
            raise UsageError("the model is closed; open it again to use it")
        if len(ids) == 0:
            raise UsageError("no tokens were given; a step needs at least one")
        worst = [i for i in ids if not 0 <= i < self.n_vocab]
        if worst:
            raise UsageError(
                f"token id {worst[0]} is outside the vocabulary; ids are 0 to {self.n_vocab - 1}"
            )
        n_tokens = len(sequence.tokens) + len(ids)
        if n_tokens > self.n_ctx:
            raise ContextOverflowError(
                f"{n_tokens} tokens do not fit the context of {self.n_ctx}; "
                "shorten the prompt or open the model with a larger n_ctx (-c)"
            )

    def _room(self, pending: SequenceOf[tuple[int, Sequence, SequenceOf[int]]]) -> int:
        """Tokens that the next step may take, so that its longest operation is a short call."""
        depth = max(len(sequence.tokens) for _, sequence, _ in pending) + self.n_batch
        longest = float(self._costs(depth).max())
        n_tokens = int(_OPERATION_S * self._macs_per_s / longest)
        return min(self.n_batch, max(_MANY_TOKENS, n_tokens))

    def _stage(
        self, batch: SequenceOf[tuple[Sequence, SequenceOf[int]]], wants_last: SequenceOf[bool]
    ) -> list[int]:
        """Write the step's arrays; return the rows of the last tokens that are wanted."""
        n = 0
        wanted = []
        every_id = [i for _, ids in batch for i in ids]
        self._ids[: len(every_id)] = self._weights.gather(every_id)
        for (sequence, ids), wants in zip(batch, wants_last, strict=True):
            self._cache.reserve(sequence, len(sequence.tokens) + len(ids))
            rows = slice(n, n + len(ids))
            start = len(sequence.tokens)
            self._positions[rows] = np.arange(start, start + len(ids))
            self._tables[rows] = sequence.table.ctypes.data
            n += len(ids)
            if wants:
                wanted.append(n - 1)
        self._step[layout.STEP_N_TOKENS // 8] = n
        self._step[layout.STEP_N_OUT // 8] = 0
        n_spans = int(self._positions[:n].max()) // layout.SPAN + 1
        few = n <= layout.SPLIT_TOKENS and n * n_spans <= layout.SPLIT_ROWS
        self._step[layout.STEP_N_SPANS // 8] = n_spans if few else 1
        return wanted

    def _head(self, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, rows): logits of the wanted rows of this step, block by block."""
        n_out = len(self._bound.logits)
        for first in range(0, len(wanted), n_out):
            rows = wanted[first : first + n_out]
            self._out_rows[: len(rows)] = rows
            self._step[layout.STEP_N_OUT // 8] = len(rows)
            self._run(self._head_first, self._n_records)
            yield first, self._bound.logits[: len(rows), : self.n_vocab]

    def _costs(self, depth: int) -> np.ndarray:
        """Multiply-adds of every record per row, when a token sees `depth` positions."""
        costs: np.ndarray = self._macs[0] + self._macs[1] * np.minimum(self._macs[2], depth)
        return costs

    def _run(self, first: int, last: int) -> None:
        """Run records [first, last) in calls of about `_CALL_S` seconds."""
        n_tokens = int(self._step[layout.STEP_N_TOKENS // 8])
        n_out = int(self._step[layout.STEP_N_OUT // 8])
        depth = int(self._positions[:n_tokens].max()) + 1
        costs = (
            self._costs(depth)[first:last]
            * np.where(self._of_out_rows, n_out, n_tokens)[first:last]
        )
        ends = np.cumsum(costs)
        done = 0
        while done < len(costs):
            start_cost = ends[done] - costs[done]
            n = int(np.searchsorted(ends, start_cost + self._macs_per_s * _CALL_S, side="right"))
            n = max(n, done + 1)
            if self._abort:
                self._abort = False
                raise Aborted("the step was aborted")
            start = time.perf_counter()
            self._team.run(self._step, first + done, first + n)
            if n_tokens >= _MANY_TOKENS:  # a few are bound by memory
                rate = (ends[n - 1] - start_cost) / (time.perf_counter() - start)
                self._macs_per_s = 0.5 * self._macs_per_s + 0.5 * rate
            done = n

    def abort(self) -> None:
        """Stop the running step from another thread; it raises `Aborted` and changes nothing."""
        self._abort = True

    def close(self) -> None:
        """Stop the threads and free all memory."""
        if self._closed:
            return
        with self._locked():
            self._closed = True
            self._team.close()
            del self._bound, self._weights, self._cache

    def profile_step(self, sequence: Sequence, ids: SequenceOf[int]) -> list[float]:
        """Append tokens to a sequence one operation at a time; seconds of each record of the table.

        Raises: UsageError when the tokens do not fit one step.
        """
        if len(ids) > self.n_batch:
            raise UsageError(f"{len(ids)} tokens do not fit a step of {self.n_batch}")
        with self._locked():
            self._check(sequence, ids)
            (self._out_rows[0],) = self._stage([(sequence, ids)], [True])
            self._step[layout.STEP_N_OUT // 8] = 1
            times = []
            for i in range(self._n_records):
                start = time.perf_counter()
                self._team.run(self._step, i, i + 1)
                times.append(time.perf_counter() - start)
            self._cache.commit(sequence, ids)
            return times


# --- kernels --------------------------------------------------------------------------------------
def load_pack(names: SequenceOf[str], target: targets.Target) -> Pack:
    """Load operations for this CPU, building first those that are missing or damaged.

    Raises: KernelError.
    """
    try:
        pack = Pack(target, home() / "packs")
        missing = pack.missing(names)
        if missing:
            _build(missing, target)
        pack.load(names)
    except (BuildError, RuntimeError, OSError) as error:
        raise KernelError(f"kernels could not be prepared: {error}") from error
    return pack


def _build(names: SequenceOf[str], target: targets.Target) -> None:
    title = f"Building kernels for {target.name} (once)"
    with progress(title, len(names), unit="") as advance:
        build(names, target, home() / "packs", n_processes=n_usable_cores(), advance=advance)


def prepare_pack(gguf: GGUFFile, config: ModelConfig, target: targets.Target) -> int:
    """Build what is missing of a model's kernels for any tier; return how many were built.

    Raises: KernelError.
    """
    builder = Builder(config, gguf.tensors)
    program = Program(builder, FAMILIES[config.arch](builder), KV_TYPES[0])
    try:
        missing = missing_objects([*program.operations, *team.NAMES], target, home() / "packs")
        if missing:
            _build(missing, target)
    except (BuildError, OSError) as error:
        raise KernelError(f"kernels could not be prepared: {error}") from error
    return len(missing)
