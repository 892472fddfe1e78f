"""Measure a model as llama-bench does, and say how near it comes to what the machine allows.

A test evaluates `n_prompt` random ids and then `n_gen` single ones behind `n_depth` others; nothing is
tokenized or sampled.  A first run of every test is not counted.  The ceilings are measured in the same
process with the same threads.  Rows are dictionaries with llama-bench's keys and then our own; what
they look like on paper is `report.py`.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from typing import Any

import numpy as np

from edgellama import __version__, cpu
from edgellama.errors import UsageError
from edgellama.gguf import GGUFFile
from edgellama.gguf.synthetic import SyntheticFile
from edgellama.kernels import targets, team
from edgellama.models.config import ModelConfig, read_config
from edgellama.progress import progress
from edgellama.runtime.ceiling import Ceilings, measure
from edgellama.runtime.cost import Cost, CostModel
from edgellama.runtime.engine import KV_TYPES, Engine
from edgellama.runtime.packs import load_pack

Row = dict[str, Any]
Open = Callable[[], GGUFFile]
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is opened with."""

    n_batch: int
    n_ubatch: int
    kv_type: str
    n_threads: int

    @property
    def n_step(self) -> int:
        """Most tokens of a step."""
        return min(self.n_batch, self.n_ubatch)


@dataclass(frozen=True, slots=True)
class Test:
    """A prompt, then single tokens, behind so many positions."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """The name that llama-bench gives it."""
        return test_name(self.n_prompt, self.n_gen, self.n_depth)


def test_name(n_prompt: int, n_gen: int, n_depth: int) -> str:
    """Return pp512, tg128, pp512+tg128, and behind a depth `pp512 @ d1024`."""
    parts = [f"pp{n_prompt}"] * (n_prompt > 0) + [f"tg{n_gen}"] * (n_gen > 0)
    return "+".join(parts) + f" @ d{n_depth}" * (n_depth > 0)


# --- options --------------------------------------------------------------------------------------
def numbers(option: str, texts: Sequence[str], low: int, high: int = MAX_TOKENS) -> list[int]:
    """Read lists of numbers and ranges: 1,2  first-last  first-last+step  first-last*factor.

    Raises: UsageError.
    """
    out: list[int] = []
    for item in ",".join(texts).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?", item.strip(), re.ASCII)
        if match is None:
            raise UsageError(
                f"{option} {item!r} is no number and no range; examples: 512  128,512  "
                "128-512+128  128-4096*2"
            )
        first = int(match[1])
        last = int(match[2] or first)
        is_factor, step = match[3] == "*", int(match[4] or 1)
        if not low <= first <= last <= high:
            raise UsageError(f"{option} {item}: numbers must rise and be between {low} and {high}")
        if first < last and (step < 2 or first == 0 if is_factor else step < 1):
            raise UsageError(f"{option} {item} would never reach its end")
        while first <= last:
            out.append(first)
            first = first * step if is_factor and step > 1 else first + step
    return out


def pairs(option: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Read pairs of numbers: P,N.

    Raises: UsageError.
    """
    out = []
    for text in texts:
        match = re.fullmatch(r"(\d+),(\d+)", text, re.ASCII)
        if match is None or not 0 < int(match[1]) + int(match[2]) <= MAX_TOKENS:
            raise UsageError(f"{option} {text!r} is no pair of token counts; an example: 512,128")
        out.append((int(match[1]), int(match[2])))
    return out


def kv_types(type_k: str, type_v: str) -> list[str]:
    """Read the list of types of cached keys, which values must share.

    Raises: UsageError.
    """
    for name in [*type_k.split(","), *type_v.split(",")]:
        if name not in KV_TYPES:
            raise UsageError(f"no KV cache is of type {name!r}; types: {', '.join(KV_TYPES)}")
    if type_k != type_v:
        raise UsageError(
            f"keys as {type_k} with values as {type_v} are not supported; give -ctk and -ctv the "
            "same type"
        )
    return type_k.split(",")


def settings(
    n_batch: Sequence[int], n_ubatch: Sequence[int], kv: Sequence[str], n_threads: Sequence[int]
) -> list[Settings]:
    """Every combination, in llama-bench's order."""
    return [Settings(*values) for values in product(n_batch, n_ubatch, kv, n_threads)]


def tests(
    n_prompt: Sequence[int],
    n_gen: Sequence[int],
    n_both: Sequence[tuple[int, int]],
    n_depth: Sequence[int],
) -> list[Test]:
    """Every test behind every depth; counts of 0 leave a test out.

    Raises: UsageError when none is left.
    """
    sizes = [*((p, 0) for p in n_prompt if p), *((0, n) for n in n_gen if n), *n_both]
    if not sizes:
        raise UsageError("there is nothing to measure: -p and -n are 0 and there is no -pg")
    return [Test(p, n, depth) for depth in n_depth for p, n in sizes]


# --- measuring ------------------------------------------------------------------------------------
class _Session:
    """An engine with what is known of it; opened anew for every setting."""

    def __init__(self, open_file: Open, setting: Settings, n_ctx: int, ceilings: Ceilings) -> None:
        self.setting = setting
        self.ceilings = ceilings
        with open_file() as gguf:
            self.costs = CostModel(gguf, read_config(gguf), setting.kv_type)
        # Kernels are built before the clock of loading runs.
        load_pack([*self.costs.program.operations, *team.NAMES], targets.detect())
        cpu.reset_peak_memory()
        start = time.perf_counter()
        with open_file() as gguf:
            config = read_config(gguf)
            self.engine = Engine(
                gguf, config, n_ctx=n_ctx, n_batch=setting.n_step, n_threads=setting.n_threads,
                kv_type=setting.kv_type,
            )  # fmt: skip
            self.about = _about(gguf, config)
            loaded_s = time.perf_counter() - start
            is_made_up = isinstance(gguf, SyntheticFile)  # which takes longer than reading
            self.load_s = None if is_made_up else loaded_s
        self._random = np.random.default_rng(1)

    def ids(self, n: int) -> list[int]:
        """Random token ids: no prefix is found twice."""
        ids: list[int] = self._random.integers(0, self.engine.n_vocab, n).tolist()
        return ids

    def row(self, test: Test, prompt_ns: list[int], total_ns: list[int]) -> Row:
        """What is said of a test."""
        steps = self.costs.steps(test.n_depth, test.n_prompt, test.n_gen, self.setting.n_step)
        n_first = len(steps) - test.n_gen
        prompt_s = statistics.mean(prompt_ns) / 1e9
        total_s = statistics.mean(total_ns) / 1e9
        rates = [(test.n_prompt + test.n_gen) * 1e9 / ns for ns in total_ns]
        prompt, generated = sum(steps[:n_first], Cost()), sum(steps[n_first:], Cost())
        read = generated.nbytes / (total_s - prompt_s) / 1e9 if test.n_gen else None
        return self._head() | {
            "n_prompt": test.n_prompt,
            "n_gen": test.n_gen,
            "n_depth": test.n_depth,
            "test_time": _now(),
            "avg_ns": round(statistics.mean(total_ns)),
            "stddev_ns": round(_deviation(total_ns)),
            "avg_ts": round(statistics.mean(rates), 6),
            "stddev_ts": round(_deviation(rates), 6),
            "samples_ns": total_ns,
            "samples_ts": [round(rate, 6) for rate in rates],
            "read_nbytes": prompt.nbytes + generated.nbytes,
            "macs": prompt.n_macs + generated.n_macs,
            "read_gb_s": read,
            "gmac_s": prompt.n_macs / prompt_s / 1e9 if test.n_prompt else None,
            "ceiling_share": sum(self.ceilings.shortest_s(step) for step in steps) / total_s,
            "load_s": self.load_s,
            "first_token_s": self._first_token_s(test, prompt_s),
            "peak_nbytes": cpu.peak_memory_nbytes(),
            **self._tail(),
        }

    def _first_token_s(self, test: Test, prompt_s: float) -> float | None:
        """Loading and the prompt, where the prompt is all that there is."""
        if self.load_s is None or test.n_depth or not test.n_prompt:
            return None
        return self.load_s + prompt_s

    def _head(self) -> Row:
        return {
            "build_commit": f"edgellama {__version__}",
            "build_number": 0,
            "cpu_info": cpu.cpu_name(),
            "gpu_info": "",
            "backends": "CPU",
            **self.about,
            "n_batch": self.setting.n_batch,
            "n_ubatch": self.setting.n_ubatch,
            "n_threads": self.setting.n_threads,
            "type_k": self.setting.kv_type,
            "type_v": self.setting.kv_type,
        }

    def _tail(self) -> Row:
        return {
            "cpu_tier": targets.detect().name,
            "ceiling_read_gb_s": self.ceilings.read / 1e9,
            **{f"ceiling_{f}_gmac_s": n / 1e9 for f, n in self.ceilings.macs.items()},
        }

    def profile_row(self, name: str, operation: str, seconds: list[float], cost: Cost) -> Row:
        """What is said of all operations of a kind in one step."""
        spent = sum(seconds)
        return self._head() | {
            "test": name,
            "operation": operation,
            "count": len(seconds),
            "total_us": spent * 1e6,
            "gmac_s": cost.n_macs / spent / 1e9 if cost.n_macs else None,
            "read_gb_s": cost.nbytes / spent / 1e9 if cost.n_macs else None,
            "ceiling_share": self.ceilings.shortest_s(cost) / spent if cost.n_macs else None,
            **self._tail(),
        }


def _sessions(open_file: Open, choices: Sequence[Settings], n_ctx: int) -> Iterator[_Session]:
    ceilings: dict[int, Ceilings] = {}
    for setting in choices:
        if setting.n_threads not in ceilings:
            ceilings[setting.n_threads] = measure(setting.n_threads)
        session = _Session(open_file, setting, n_ctx, ceilings[setting.n_threads])
        try:
            yield session
        finally:
            session.engine.close()


def run(
    open_file: Open, choices: Sequence[Settings], todo: Sequence[Test], n_repeats: int
) -> Iterator[Row]:
    """Run every test under every setting; yield a row for each."""
    n_ctx = max(test.n_depth + test.n_prompt + test.n_gen for test in todo)
    for session in _sessions(open_file, choices, n_ctx):
        for test in todo:
            # The bar is gone before a row is out: while it is there, it takes stdout for its own.
            with progress(test.name, n_repeats + 1, unit="") as advance:
                times = _times(session, test, n_repeats, advance)
            yield session.row(test, [prompt for prompt, _ in times], [total for _, total in times])


def _times(
    session: _Session, test: Test, n_repeats: int, advance: Callable[[int], None]
) -> list[tuple[int, int]]:
    """Nanoseconds of the prompt and of the whole, for every repeat but the first."""
    engine = session.engine
    sequence = engine.new_sequence()
    if test.n_depth:
        engine.evaluate(sequence, session.ids(test.n_depth))
    times = []
    for repeat in range(n_repeats + 1):
        prompt, generated = session.ids(test.n_prompt), session.ids(test.n_gen)
        start = time.perf_counter_ns()
        if prompt:
            engine.evaluate(sequence, prompt)
        middle = time.perf_counter_ns()
        for token in generated if repeat else generated[:1]:
            engine.evaluate(sequence, [token])
        end = time.perf_counter_ns()
        if repeat:
            times.append((middle - start, end - start))
        engine.truncate(sequence, test.n_depth)
        advance(1)
    engine.free(sequence)
    return times


def profile(
    open_file: Open, choices: Sequence[Settings], todo: Sequence[Test], n_repeats: int
) -> Iterator[Row]:
    """Run one step of every prompt and of every kind of generation, operation by operation.

    Yields a row per kind of operation, their sum, and the step run as a whole: what waits less.
    Raises: UsageError when a prompt does not fit one step.
    """
    steps = list(dict.fromkeys((t.n_prompt or 1, t.n_prompt > 0, t.n_depth) for t in todo))
    n_most = min(choice.n_step for choice in choices)
    for n, _, _ in steps:
        if n > n_most:
            raise UsageError(
                f"a step holds {n_most} tokens, so that a prompt of {n} is several; "
                f"use -p {n_most}, or larger -b and -ub"
            )
    for session in _sessions(open_file, choices, max(n + depth for n, _, depth in steps)):
        for n, is_prompt, depth in steps:
            name = test_name(n, 0, depth) if is_prompt else test_name(0, n, depth)
            with progress(name, n_repeats + 1, unit="") as advance:
                rows = _profile_step(session, name, n, depth, n_repeats, advance)
            yield from rows


def _profile_step(
    session: _Session, name: str, n: int, depth: int, n_repeats: int, advance: Callable[[int], None]
) -> list[Row]:
    engine = session.engine
    sequence = engine.new_sequence()
    if depth:
        engine.evaluate(sequence, session.ids(depth))
    alone, whole = [], []
    for _ in range(n_repeats + 1):
        alone.append(engine.profile_step(sequence, session.ids(n)))
        engine.truncate(sequence, depth)
        ids = session.ids(n)
        start = time.perf_counter()
        engine.evaluate(sequence, ids)
        whole.append(time.perf_counter() - start)
        engine.truncate(sequence, depth)
        advance(1)
    engine.free(sequence)
    medians = np.median(alone[1:], axis=0).tolist()
    kinds: dict[str, tuple[list[float], Cost]] = {}
    for record, seconds in zip(session.costs.program.records, medians, strict=True):
        kind = record.operation.partition(".")[2]
        times, cost = kinds.get(kind, ([], Cost()))
        kinds[kind] = ([*times, seconds], cost + session.costs.record(record, depth, n))
    total = sum((cost for _, cost in kinds.values()), Cost())
    ordered = sorted(kinds.items(), key=lambda item: -sum(item[1][0]))
    rows = [session.profile_row(name, kind, times, cost) for kind, (times, cost) in ordered]
    rows.append(session.profile_row(name, "all, one by one", medians, total))
    rows.append(session.profile_row(name, "the step", [statistics.median(whole[1:])], total))
    for row in rows:
        row["time_share"] = row["total_us"] / 1e6 / sum(medians)
    return rows


# --- what is said of a model ----------------------------------------------------------------------
def _about(gguf: GGUFFile, config: ModelConfig) -> Row:
    n_params = sum(tensor.n_weights for tensor in gguf.tensors.values())
    by_type: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        if tensor.name.startswith("blk."):
            by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.nbytes
    size = f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.0f}M"
    return {
        "model_filename": str(gguf.path),
        "model_type": f"{config.arch} {size} {max(by_type, key=by_type.__getitem__).upper()}",
        "model_size": sum(tensor.nbytes for tensor in gguf.tensors.values()),
        "model_n_params": n_params,
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
