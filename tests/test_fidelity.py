"""How far we are from a float32 evaluation of the same weights, and from llama.cpp's greedy texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import DATA
from naive import log_softmax
from test_models import open_engine

from edgellama import LLM

GOLDEN = json.loads((DATA / "golden.json").read_text())["models"]
IDS = json.loads((DATA / "token_ids.json").read_text())

# Mean KL of llama.cpp (llama-cpp-python 0.3.36, AVX2) on the same rows.
LLAMA_CPP = {"smollm2": 0.00309, "gemma3": 0.00573}
FILES = {"smollm2": "SmolLM2-135M-Instruct.Q4_1", "gemma3": "gemma-3-270m-q4_k_m"}


@pytest.mark.parametrize("name", FILES)
def test_divergence_is_at_most_llama_cpps(name, request):
    reference = np.load(DATA / "reference" / f"{FILES[name]}.npz")
    engine = open_engine(request.getfixturevalue(name))
    logits = engine.logits(reference["tokens"].tolist()).astype(np.float64)
    engine.close()
    q = np.take_along_axis(log_softmax(logits), reference["top_ids"].astype(int), 1)
    log_p = reference["top_logprobs"].astype(np.float64)
    rest = np.log1p(-np.exp(q).sum(1))
    log_rest = reference["rest_logprob"].astype(np.float64)
    kl = (np.exp(log_p) * (log_p - q)).sum(1) + np.exp(log_rest) * (log_rest - rest)
    assert kl.mean() <= LLAMA_CPP[name]
    sure = log_p[:, 0] - log_p[:, 1] > 0.3
    assert (logits.argmax(1) == reference["argmax"])[sure].all()


@pytest.mark.parametrize("name", FILES)
def test_greedy_text_and_token_ids_are_llama_cpps(name, request):
    path = request.getfixturevalue(name)
    expected = IDS["models"][path.name]
    with LLM(path, n_ctx=512) as llm:
        for text, plain, special in zip(
            IDS["strings"], expected["plain"], expected["special"], strict=True
        ):
            assert llm.tokenize(text, add_special=False) == plain
            assert llm.tokenize(text, parse_special=True) == special
        for case in GOLDEN[path.stem]:
            sequence = llm._engine.new_sequence()
            logits = llm._engine.evaluate(sequence, case["prompt_ids"])
            for token, margin in zip(case["ids"], case["margins"], strict=True):
                # A close call: rounding may decide either way. Two texts part just above 0.3 of
                # llama.cpp's own logits (0.330, 0.343); in float64 those leads are -0.22 and 0.08.
                if margin < 0.35:
                    break
                assert int(logits.argmax()) == token
                logits = llm._engine.evaluate(sequence, [token])
            llm._engine.free(sequence)


def test_stories_model_tells_its_upstream_story():
    folder = DATA.parents[2] / "shared" / "data" / "tiny_models" / "stories260K"
    if not folder.exists():
        pytest.skip("the stories260K model is not beside the checkout")
    expected = json.loads((folder / "expected.json").read_text())["greedy_200_steps"]
    with LLM(folder / "stories260K.f32.gguf") as llm:
        text = ""
        for delta in llm.stream([llm.tokenizer.bos_id], max_tokens=199, temperature=0):
            text += delta.text
    assert expected["text"].strip().startswith(text.strip())
    assert len(text) > 450
