"""How far the logits of the real models are from a float32 evaluation of the same weights.

The reference arrays are log-probabilities of the dequantized weights over a fixed text; beside them
stands the divergence of every row of llama.cpp (`benchmarks/record_golden.py`), so that the
difference is paired and its error small.
"""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import DATA

from edgellama import LLM

LEAD = 0.3  # nats: a first choice this far ahead is no close call

# model fixture, its arrays, mean KL of llama.cpp's AVX2 build
MODELS = [
    ("smollm2", "SmolLM2-135M-Instruct.Q4_1", 0.00309),
    ("gemma3", "gemma-3-270m-q4_k_m", 0.00573),
]


def read_reference(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / "reference" / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


@pytest.mark.parametrize(("fixture", "name", "peer_kl"), MODELS)
def test_divergence_is_at_most_llama_cpps(
    fixture: str, name: str, peer_kl: float, request: pytest.FixtureRequest
) -> None:
    """Mean KL is at most llama.cpp's plus two standard errors of the paired difference."""
    reference = read_reference(name)
    ids = reference["tokens"].tolist()
    with LLM(request.getfixturevalue(fixture), n_ctx=len(ids)) as llm:
        logits = llm.logits(ids)
    kl = naive.divergence(logits, reference)
    difference = kl - reference["llama_cpp_kl"]
    error = float(difference.std(ddof=1) / np.sqrt(len(kl)))
    seen = f"mean KL {kl.mean():.5f}, llama.cpp {peer_kl:.5f}, error {error:.5f}"
    print(f"\n{name}: {seen}, largest {kl.max():.3f}")
    assert kl.mean() <= peer_kl + 2 * error, seen

    leads = reference["top_logprobs"][:, 0] - reference["top_logprobs"][:, 1]
    differs = logits.argmax(axis=1) != reference["argmax"]
    upsets = np.flatnonzero(differs & (leads >= LEAD))
    assert not len(upsets), f"first choice differs at rows {upsets}, which lead by {leads[upsets]}"


@pytest.mark.parametrize(("fixture", "name", "peer_kl"), MODELS)
def test_q8_0_cache_costs_little(
    fixture: str, name: str, peer_kl: float, request: pytest.FixtureRequest
) -> None:
    """Mean KL is within 0.001 of that with the f16 cache."""
    reference = read_reference(name)
    ids = reference["tokens"].tolist()
    means = {}
    for kv_type in ("f16", "q8_0"):
        with LLM(request.getfixturevalue(fixture), n_ctx=len(ids), kv_type=kv_type) as llm:
            means[kv_type] = naive.divergence(llm.logits(ids), reference).mean()
    print(f"\n{name}: mean KL {means}")
    assert means["q8_0"] <= means["f16"] + 1e-3, means


@pytest.mark.parametrize(("fixture", "name", "peer_kl"), MODELS)
def test_oracle_is_the_reference(
    fixture: str, name: str, peer_kl: float, request: pytest.FixtureRequest
) -> None:
    """The oracle of `test_models.py` agrees with an evaluation that was made by other software."""
    reference = read_reference(name)
    with naive.NaiveModel(request.getfixturevalue(fixture), dtype=np.float32) as model:
        logits = model.logits(reference["tokens"][:12].tolist())
    assert np.abs(naive.divergence(logits, reference)).max() < 1e-6
