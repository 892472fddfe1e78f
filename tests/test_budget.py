"""`--target-bpw`: formats under a budget of bytes."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from make_gguf import make_model

from edgellama.convert.budget import _cheapest, choose_by_size
from edgellama.convert.encoder import Encoder
from edgellama.convert.quantize import gguf_source
from edgellama.convert.recipes import Choices
from edgellama.errors import UsageError
from edgellama.gguf import open_gguf


@pytest.fixture(scope="module")
def encoder():
    with Encoder(2) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("budget") / "m.gguf", format_name="f32", tied=False)
    with open_gguf(path) as gguf:
        yield [gguf_source(gguf, name) for name in gguf.tensors]


def bits(tensors) -> float:
    return 8 * sum(t.nbytes for t in tensors) / sum(prod(t.shape) for t in tensors)


def test_the_budget_is_kept_and_used(sources, encoder):
    sizes = []
    for target in (3.5, 4.5, 6.0, 9.0):
        chosen = choose_by_size(sources, encoder, target, Choices(), {})
        assert target - 0.5 < bits(chosen) <= target
        sizes.append(bits(chosen))
        assert all(t.format.name == "f32" for t in chosen if len(t.shape) == 1)
    assert sizes == sorted(sizes)
    with pytest.raises(UsageError, match=r"--target-bpw 2 is too small: this model needs \d"):
        choose_by_size(sources, encoder, 2.0, Choices(), {})


def test_the_head_is_worth_more_than_another_matrix(sources, encoder):
    formats = {t.name: t for t in choose_by_size(sources, encoder, 5.0, Choices(), {})}
    head = formats["output.weight"].format
    assert head.nbytes / head.n_weights >= max(
        t.format.nbytes / t.format.n_weights
        for name, t in formats.items() if name.endswith(("ffn_up.weight", "ffn_gate.weight"))
    )  # fmt: skip


def test_choices_and_importance(sources, encoder):
    choices = Choices([("attn_q", "f16")], keep_output=True)
    formats = {t.name: t.format.name for t in choose_by_size(sources, encoder, 12, choices, {})}
    assert formats["output.weight"] == "f32"
    assert formats["blk.0.attn_q.weight"] == formats["blk.1.attn_q.weight"] == "f16"
    # A tensor of which nothing but one column matters, and that is nearly exact in every format.
    name = "blk.0.ffn_up.weight"
    weights = np.zeros(256, np.float32)
    plain = {t.name: t.format for t in choose_by_size(sources, encoder, 5.0, Choices(), {})}
    weights[0] = 1.0
    known = choose_by_size(sources, encoder, 5.0, Choices(), {name: weights})
    assert {t.name: t.format for t in known}[name].nbytes <= plain[name].nbytes


def test_prices_find_the_best_choice():
    rng = np.random.default_rng(0)
    options = [
        {str(i): (float(2.0 ** (-2 * i) * rng.uniform(0.5, 2)), 100 * (i + 1)) for i in range(4)}
        for _ in range(5)
    ]
    for budget in (700, 1000, 1500):
        names = _cheapest(options, budget)
        error = sum(o[n][0] for o, n in zip(options, names, strict=True))
        assert sum(o[n][1] for o, n in zip(options, names, strict=True)) <= budget
        best = min(
            sum(o[n][0] for o, n in zip(options, choice, strict=True))
            for choice in product("0123", repeat=5)
            if sum(o[n][1] for o, n in zip(options, choice, strict=True)) <= budget
        )
        assert error <= 1.2 * best
