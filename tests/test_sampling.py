"""Sampling and stop strings: the definition, ties and edges; third-party values where present."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path

import numpy as np
import pytest

from edgellama import LLM, keywords
from edgellama.errors import EdgeLlamaError, UsageError
from edgellama.sampling import Sampler, SamplingOptions, dry, penalties, read_options, truncation
from edgellama.sampling.history import History
from edgellama.sampling.mirostat import Mirostat
from edgellama.sampling.options import OPTION_NAMES
from edgellama.sampling.truncation import Candidates, softmax
from edgellama.stopping import StopStrings

CASES = Path(__file__).parents[2] / "shared" / "data" / "cases" / "sampling.json"
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def naive(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> dict:
    """The definition, step by step: {id: probability}."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    p = np.exp(np.array([logits[i] for i in order], np.float64) - logits[order[0]])
    p /= p.sum()
    n = next((i + 1 for i, c in enumerate(np.cumsum(p)) if c >= top_p), len(p))
    order, p = order[:n], p[:n]
    order = [i for i, each in zip(order, p, strict=True) if each >= min_p * p[0]]
    p = np.exp((np.array([logits[i] for i in order], np.float64) - logits[order[0]]) / temperature)
    return dict(zip(order, p / p.sum(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_against_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=int(random.integers(1, 300))).astype(np.float32) * 3
    options = {
        "temperature": float(random.uniform(0.1, 3)),
        "top_k": int(random.integers(0, 60)),
        "top_p": float(random.uniform(0.05, 1)),
        "min_p": float(random.choice([0.0, 0.02, 0.3])),
    }
    ids, p = Sampler(SamplingOptions(**options)).candidates(logits)
    expected = naive(logits, **options)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(p, list(expected.values()), rtol=1e-6)


# --- values of a third party ----------------------------------------------------------------------
BY_NAME = {
    "temp": lambda c, case: truncation.temperature(c, case["temp"]),
    "temp_ext": lambda c, case: truncation.temperature(
        c, case["temp"], case["delta"], case["exponent"]
    ),
    "top_k": lambda c, case: truncation.top_k(c, int(case["k"])),
    "top_p": lambda c, case: truncation.top_p(c, case["p"]),
    "min_p": lambda c, case: truncation.min_p(c, case["p"]),
    "typical": lambda c, case: truncation.typical_p(c, case["p"]),
    "xtc": lambda c, case: truncation.xtc(c, case["probability"], case["threshold"], 0.0),
    "top_n_sigma": lambda c, case: truncation.top_n_sigma(c, case["n"]),
    "penalties": lambda c, case: penalties.penalize(
        c, text_of(case),
        SamplingOptions(
            repeat_penalty=case["repeat"], frequency_penalty=case["frequency"],
            presence_penalty=case["presence"],
        ),
    ),
    "dry": lambda c, case: dry.penalize(
        c, text_of(case),
        SamplingOptions(
            dry_multiplier=case["multiplier"], dry_base=case["base"],
            dry_allowed_length=int(case["allowed_length"]),
            dry_penalty_last_n=int(case["penalty_last_n"]),
        ),
        {int(head): [tuple(map(int, tail))] for head, *tail in case["seq_breakers"]},
    ),
}  # fmt: skip


def text_of(case: dict) -> History:
    return History([int(token) for token in case["last_tokens"]])


def third_party() -> list[dict]:
    return json.loads(CASES.read_text()) if CASES.exists() else []


@pytest.mark.skipif(not CASES.exists(), reason="third-party values are not in this repository")
def test_third_party_values_are_there() -> None:
    assert len(third_party()) == 65


@pytest.mark.parametrize("case", [c for c in third_party() if c["sampler"] != "sampler_queue"])
def test_third_party_probabilities(case: dict) -> None:
    logits = np.log(np.array(case["probs"], np.float32))
    c = BY_NAME[case["sampler"]](Candidates(np.arange(len(logits)), logits), case)
    expected = sorted((p for p in case["expected"] if p > 0), reverse=True)
    p = np.sort(softmax(c.logits))[::-1]
    shares = np.array(expected) / sum(expected)  # after XTC and typical, theirs are not normalized
    np.testing.assert_allclose(p[: len(expected)], shares, atol=1e-5)
    assert p[len(expected) :].sum() < 1e-5  # they list what is excluded as zeros


@pytest.mark.parametrize("case", [c for c in third_party() if c["sampler"] == "sampler_queue"])
def test_third_party_queues(case: dict) -> None:
    """Token i of n has probability proportional to i: what is left can be counted."""
    n = int(case["n_vocab"])
    with np.errstate(divide="ignore"):
        logits = np.log(np.arange(n).astype(np.float32))
    c, first = Candidates(np.arange(n), logits), 0
    for letter in case["sequence"]:
        before = len(c.ids)
        if letter == "k":
            c = truncation.top_k(c, int(case["top_k"]))
            first = max(first, n - int(case["top_k"]))
            expected = min(before, int(case["top_k"]))
        elif letter == "p":
            c = truncation.top_p(c, case["top_p"])
            if case["top_p"] >= 1:
                expected = before
            else:
                weights = np.arange(n - 1, first - 1, -1)
                enough = np.float32(case["top_p"]) * weights.sum()
                expected = int(np.searchsorted(np.cumsum(weights), enough)) + 1
                first = n - expected
        else:
            c = truncation.min_p(c, case["min_p"])
            least = np.float32(case["min_p"]) * (n - 1)
            first = max(first, int(np.ceil(least * (1 - 1e-7))))
            expected = n - first
        assert sorted(c.ids.tolist()) == list(range(n - expected, n))


def test_equal_logits_stand_in_the_order_of_their_ids() -> None:
    logits = np.array([1, 2, 2, 0, 2, 2], np.float32)
    ids, p = Sampler(SamplingOptions(**{**OFF, "top_k": 3})).candidates(logits)
    assert ids.tolist() == [1, 2, 4]
    np.testing.assert_allclose(p, 1 / 3)
    assert Sampler(SamplingOptions(temperature=0)).sample(logits) == 1


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(50, -np.inf, np.float32)
    logits[[7, 9]] = 1.0
    sampler = Sampler(SamplingOptions(**OFF), seed=1)
    assert {sampler.sample(logits) for _ in range(100)} == {7, 9}


@pytest.mark.parametrize(
    "logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf], [np.nan, np.nan]]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(logits: list[float], temperature: float) -> None:
    with pytest.raises(EdgeLlamaError, match="no finite logits"):
        Sampler(SamplingOptions(temperature=temperature)).sample(np.array(logits, np.float32))


@pytest.mark.parametrize("temperature", [1e-300, 1e-5])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([0.0, 3.0, 2.9], np.float32)
    sampler = Sampler(SamplingOptions(**{**OFF, "temperature": temperature}))
    assert [sampler.sample(logits) for _ in range(5)] == [1] * 5


def test_shares_of_draws() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(SamplingOptions(**OFF), seed=3)
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)  # 3.8 standard deviations


def test_numpy_numbers_are_numbers() -> None:
    options = SamplingOptions(
        temperature=np.float32(0.5), top_k=np.int64(4), top_p=np.float64(0.9), min_p=np.float32(0.0)
    )  # fmt: skip
    Sampler(options, seed=np.int64(3))


@pytest.mark.parametrize("options", [{"top_k": True}, {"top_k": 1.5}, {"min_keep": -1}])
def test_refused(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampler(SamplingOptions(**options))


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"temperature": 0.0}])
def test_large_vocabularies_are_fast(options: dict) -> None:
    logits = np.random.default_rng(0).normal(size=262144).astype(np.float32) * 4
    sampler = Sampler(SamplingOptions(**options), seed=0)
    best = min(_seconds(sampler, logits) for _ in range(5))
    assert best < 0.03


def _seconds(sampler: Sampler, logits: np.ndarray) -> float:
    start = time.perf_counter()
    sampler.sample(logits)
    return time.perf_counter() - start


# --- what is kept, and drawn ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"top_p": 0.1}, {"min_p": 0.99}, {"typical_p": 0.01}, {"top_p": 0.1, "min_p": 0.9}]
)
@pytest.mark.parametrize("n", [0, 1, 5, 400])
def test_min_keep(options: dict, n: int) -> None:
    logits = np.random.default_rng(n).normal(size=300).astype(np.float32)
    usual, _ = Sampler(SamplingOptions(**{**OFF, **options})).candidates(logits)
    ids, _ = Sampler(SamplingOptions(**{**OFF, **options}, min_keep=n)).candidates(logits)
    assert len(ids) == max(len(usual), min(n, 300))
    if "typical_p" not in options:
        assert ids.tolist() == np.argsort(-logits, kind="stable")[: len(ids)].tolist()


def test_xtc_keeps_min_keep() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    for n, expected in ((0, [2, 3]), (2, [2, 3]), (3, [0, 1, 2, 3])):
        options = SamplingOptions(**OFF, xtc_probability=1.0, xtc_threshold=0.15, min_keep=n)
        assert Sampler(options).candidates(logits)[0].tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 511, 512, 513, 5000])
def test_pick_is_the_running_sum(n: int) -> None:
    rng = np.random.default_rng(n)
    weights = (rng.random(n) * (rng.random(n) < 0.5)).astype(np.float32)
    weights[n // 2] = 1.0
    ends = np.cumsum(weights, dtype=np.float64)
    for chance in rng.random(50):
        at = truncation.pick(weights, chance)
        assert weights[at] > 0
        assert ends[at] >= chance * ends[-1] - 1e-9 >= ends[at] - weights[at] - 2e-9
    for chance in (0.0, float(np.nextafter(1.0, 0.0))):
        assert weights[truncation.pick(weights, chance)] > 0


@pytest.mark.parametrize("k", [1, 3, 40, 900, 5000])
def test_largest_of_many(k: int) -> None:
    values = np.random.default_rng(k).integers(0, 800, 20011).astype(np.float32)  # many ties
    assert truncation.largest(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"dynatemp_range": 0.5}, {"mirostat": 2}])
def test_a_mask_is_the_same_narrow_or_wide(options: dict) -> None:
    """Those that are masked out might as well not be there."""
    logits = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 3
    for n in (1, 3, 100, 124, 126, 900):
        allowed = np.zeros(1000, bool)
        allowed[np.random.default_rng(n).permutation(1000)[:n]] = True
        few = Sampler(SamplingOptions(**options), seed=4)
        alone = Sampler(SamplingOptions(**options), seed=4)
        drawn = [few.sample(logits, allowed) for _ in range(30)]
        expected = [alone.sample(logits[allowed]) for _ in range(30)]
        assert drawn == np.flatnonzero(allowed)[expected].tolist()


def test_a_mask_has_the_last_word() -> None:
    def promote(ids: np.ndarray, row: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(row)) == 5, np.float32(100), row)

    allowed = np.arange(10) != 5
    options = SamplingOptions(temperature=0, logit_bias={5: 50})
    assert Sampler(options, processors=[promote]).sample(np.zeros(10, np.float32)) == 5
    assert Sampler(options, processors=[promote]).sample(np.zeros(10, np.float32), allowed) == 0
    with pytest.raises(UsageError, match="no token can follow"):
        Sampler(options).sample(np.zeros(10, np.float32), np.zeros(10, bool))


def test_a_fork_draws_the_same_and_leaves_the_sampler_alone() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 500)).astype(np.float32)
    options = SamplingOptions(repeat_penalty=1.3, mirostat=2, mirostat_tau=2, dry_multiplier=1)

    def draw(sampler: Sampler, rows: np.ndarray) -> list[int]:
        out = []
        for row in rows:
            out.append(sampler.sample(row))
            sampler.accept(out[-1])
        return out

    sampler, other = (Sampler(options, seed=1, text=[1, 2, 3]) for _ in range(2))
    assert draw(sampler, rows[:30]) == draw(other, rows[:30])
    expected = draw(other, rows[30:])
    assert draw(sampler.fork(), rows[30:]) == expected
    assert draw(sampler, rows[30:]) == expected


# --- options --------------------------------------------------------------------------------------
def test_keywords_for_type_checkers_are_the_options() -> None:
    assert list(keywords.SamplingKeywords.__annotations__) == list(OPTION_NAMES)
    taken = inspect.signature(LLM._prepare).parameters.values()
    named = {p.name for p in taken if p.kind is p.KEYWORD_ONLY} - {"shown", "together"}
    assert {*keywords.AnswerKeywords.__annotations__} == {*OPTION_NAMES} | named


def test_options_do_not_change() -> None:
    options = SamplingOptions(samplers="top_k; typical-p;temp", dry_sequence_breakers="x")
    assert options.samplers == ("top_k", "typ_p", "temperature")
    assert options.dry_sequence_breakers == ("x",)
    with pytest.raises(AttributeError):
        options.top_k = 3  # type: ignore[misc]
    assert read_options({"top_k": 3, "top_p": None}) == SamplingOptions(top_k=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1}, "'temprature'; options are temperature, top_k"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number between 0 and 2147483647"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be between 0 and 1"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a number between 0 and 100"),
        ({"mirostat": 3}, "mirostat is 3"), ({"samplers": 3}, "samplers is 3"),
        ({"samplers": ["top_q"]}, "'top_q'; samplers are penalties"),
        ({"dry_sequence_breakers": 3}, "dry_sequence_breakers is 3"), ({"logit_bias": 3}, "logit_bias"),
    ],
)  # fmt: skip
def test_errors_name_option_value_and_range(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_options(options)


# --- repetitions ----------------------------------------------------------------------------------
def naive_repetitions(text: list[int], least: int, breakers: set[int]) -> dict[int, int]:
    """The longest end of the text, without a breaker, that stands before each token."""
    out: dict[int, int] = {}
    for i in range(1, len(text)):
        for n in range(least, i + 1):
            end = text[len(text) - n :]
            if text[i - n : i] == end and not breakers & {*end}:
                out[text[i]] = max(out.get(text[i], 0), n)
    return out


def repetitions(text: list[int], least: int, most: int, breakers: dict) -> dict[int, int]:
    ids, lengths = dry.repetitions(np.array(text), least, most, breakers)
    assert sorted(set(ids.tolist())) == ids.tolist()
    return dict(zip(ids.tolist(), lengths.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_repetitions_against_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 3, int(rng.integers(1, 40))).tolist()
    least, breakers = int(rng.integers(1, 4)), {2} if seed % 2 else set()
    tails = {token: [()] for token in breakers}
    found = repetitions(text, least, 10**6, tails)
    assert found == naive_repetitions(text, least, breakers)
    most = least + 2
    capped = {token: min(n, most) for token, n in found.items()}
    assert repetitions(text, least, most, tails) == capped


def test_breakers_of_several_tokens() -> None:
    pieces = [b"a", b"xs", b"to", b"stop", b"p", b"s", b"q"]
    found = dry.find_breakers(["stop"], pieces, lambda text: [*text.encode()])
    assert found == {3: [()], 1: [tuple(b"top")], 5: [tuple(b"top")]}
    breakers = {1: [(2, 4)]}  # xs to p
    assert repetitions([9, 9, 1, 2, 4, 9, 9], 1, 9, breakers) == {9: 1, 1: 2}
    assert repetitions([1, 2, 4, 7, 1, 2, 4], 1, 9, breakers) == {}
    assert repetitions([1, 2, 9, 7, 1, 2, 9], 1, 9, breakers) == {7: 3}


# --- mirostat -------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_mirostat_keeps_the_surprise(
    version: int, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean surprise, of what was left to draw from, is the target."""
    surprises = []
    learn = Mirostat.learn
    monkeypatch.setattr(
        Mirostat, "learn", lambda self, p: (surprises.append(-np.log2(p)), learn(self, p))
    )
    logits = (-1.1 * np.log(np.arange(1, 5001))).astype(np.float32)  # Zipf's law
    sampler = Sampler(SamplingOptions(temperature=1.0, mirostat=version, mirostat_tau=tau), seed=1)
    drawn = [sampler.sample(logits) for _ in range(1000)]
    assert abs(float(np.mean(surprises[200:])) - tau) < 0.3
    assert len({*drawn}) > 3


# --- stop strings ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        ([], "all of it", "all of it"),
        (["ab", "xaby"], "1xaby", "1x"),
        (["aab"], "aaaab", "aa"),
        (["\n\n", "\nUser:"], "a\nb\nUser: c", "a\nb"),
        (["世界"], "世x世界", "世x"),
        (["never"], "nev neve", "nev neve"),
    ],
)
def test_pieces_do_not_matter(stops: list[str], text: str, shown: str) -> None:
    for size in range(1, len(text) + 1):
        rule = StopStrings(stops)
        out = "".join(rule.feed(text[i : i + size]) for i in range(0, len(text), size))
        assert shown.startswith(out)
        assert out + rule.flush() == shown
        assert rule.stopped == (shown != text)
        assert not rule.stopped or rule.feed("more") == ""


def test_one_string_is_one_stop() -> None:
    assert StopStrings("ab").feed("xaby") == "x"
