"""Likelihoods, labels and vectors of a real model, against what its logits say."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from edgellama import LLM
from edgellama.errors import ContextOverflowError, UsageError
from edgellama.gguf import open_gguf
from edgellama.tasks import Classifier, Score, log_softmax

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm(smollm2):
    with LLM(smollm2, n_ctx=256, n_batch=64) as llm:
        yield llm


def logprobs(llm: LLM, ids: list[int], first: int) -> list[float]:
    """The same, from the logits of the whole text."""
    rows = llm.logits(ids)
    return [float(log_softmax(rows[i - 1])[ids[i]]) for i in range(first, len(ids))]


@pytest.mark.parametrize("continuation", [" Paris", " Paris, of course.", "is", "\u5df4\u9ece"])
def test_score_is_what_the_logits_say(llm, continuation):
    score = llm.score(PROMPT, continuation)
    whole, prompt = llm.tokenize(PROMPT + continuation), llm.tokenize(PROMPT)
    n = len(whole) - len(score.tokens)
    assert whole[n:] == score.tokens
    assert whole[:n] == prompt[:n]
    assert n == len(prompt) or whole[n] != prompt[n]
    assert score.logprobs == logprobs(llm, whole, n)
    assert score.perplexity == pytest.approx(np.exp(-score.logprob / len(score.tokens)))


def test_scores_of_several_are_those_of_each(llm):
    texts = [" Paris", " Berlin, I think", "is", " Paris"]
    assert llm.score(PROMPT, texts) == [llm.score(PROMPT, text) for text in texts]
    assert llm.score(PROMPT, []) == []


def test_an_empty_prompt_needs_a_first_token(llm):
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.score("", "Hello")


def test_a_continuation_is_not_empty(llm):
    with pytest.raises(UsageError, match="a continuation is ''"):
        llm.score(PROMPT, ["", "x"])


def test_the_context_holds_only_so_much(llm):
    with pytest.raises(ContextOverflowError, match="256"):
        llm.score("word " * 300, " end")
    assert llm.score(PROMPT, " Paris").logprob > -1.0  # and goes on


def test_classify(llm):
    texts = ["A masterpiece, moving and funny.", "A dull and tedious mess. I hated it."]
    found = llm.classify(texts, ["negative", "positive"], prompt="{text}\nSentiment:")
    assert found == [
        llm.classify(t, ["negative", "positive"], prompt="{text}\nSentiment:") for t in texts
    ]
    assert [sum(c.probabilities.values()) for c in found] == pytest.approx([1.0, 1.0])
    gap = found[0].probabilities["positive"] - found[1].probabilities["positive"]
    assert gap > 0.1


def fake_score(prompt: str, said: list[str]) -> list[Score]:
    """A model that likes "yes" twice as much as "no", and four times where the text is good."""
    prompts.append(prompt)
    yes = np.log(0.8 if "good" in prompt.rsplit("Text:", 1)[1] else 2 / 3)
    table = {" yes": [yes, yes], " no": [np.log1p(-np.exp(yes))]}
    return [Score([0] * len(table[text]), table[text]) for text in said]


prompts: list[str] = []


def test_labels_are_compared_per_token_and_without_their_bias():
    labels = {"positive": "yes", "negative": "no"}
    plain = Classifier(fake_score, labels)("bad")
    assert plain.probabilities == pytest.approx({"positive": 2 / 3, "negative": 1 / 3})
    calibrated = Classifier(fake_score, labels, calibrated=True)
    assert calibrated("bad").probabilities == pytest.approx({"positive": 0.5, "negative": 0.5})
    assert calibrated("good").label == "positive"


def test_examples_come_before_the_text():
    examples = [("so {text} good", "a"), ("bad", "b")]
    labels = {"a": "yes", "b": "no"}
    prompts.clear()
    Classifier(fake_score, labels, prompt="{labels}? Text: {text}\nIs it?", examples=examples)("x")
    assert prompts == [
        "yes, no? Text: so {text} good\nIs it? yes\n\nyes, no? Text: bad\nIs it? no\n\n"
        "yes, no? Text: x\nIs it?"
    ]


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        (["a"], {}, "two or more different"),
        (["a", "a"], {}, "two or more different"),
        ("ab", {}, "two or more different"),
        (["a", " "], {}, "a label is empty"),
        (["a", "b"], {"prompt": "Label:"}, r"has no \{text\}"),
        (["a", "b"], {"examples": [("x", "c")]}, "has the label 'c'; labels are a, b"),
    ],
)
def test_labels_that_cannot_be(labels, options, match):
    with pytest.raises(UsageError, match=match):
        Classifier(fake_score, labels, **options)


def test_vectors_are_what_the_head_reads(llm, smollm2):
    text = "The quick brown fox jumps over the lazy dog. " * 8  # more than a step
    (rows,) = llm.embed([text], pooling="none", normalize=False)
    logits = llm.logits(llm.tokenize(text))
    with open_gguf(smollm2) as gguf:
        info = gguf.tensors["token_embd.weight"]
        packed = np.empty((info.shape[1], info.format.row_nbytes(info.shape[0])), np.uint8)
        gguf.bytes_of(info.name).read_into(packed.reshape(-1), 0)
    head = quants.dequantize(packed, GGMLQuantizationType[info.type_name.upper()])
    error = np.linalg.norm(rows @ head.T - logits, axis=1) / np.linalg.norm(logits, axis=1)
    assert len(rows) > 64
    assert error.max() < 0.02


def test_vectors_do_not_depend_on_company(llm):
    texts = ["One.", "Two texts, one step.", "And a long one: " + "word " * 100, "\u732b"]
    together = llm.embed(texts)
    assert together.shape == (4, llm.config.width)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    for text, vector in zip(texts, together, strict=True):
        assert (llm.embed(text) == vector).all()


def test_poolings(llm):
    (rows,) = llm.embed(["Three tokens here"], pooling="none", normalize=False)
    pooled = {
        p: llm.embed("Three tokens here", p, normalize=False) for p in ("mean", "last", "cls")
    }
    assert np.allclose(pooled["mean"], rows.mean(0), rtol=1e-5)
    assert (pooled["last"] == rows[-1]).all()
    assert (pooled["cls"] == rows[0]).all()
    with pytest.raises(
        UsageError, match="pooling is 'max'; it must be one of mean, last, cls, none"
    ):
        llm.embed("x", "max")


def test_vectors_of_too_long_or_empty_texts(llm):
    with pytest.raises(ContextOverflowError, match="256"):
        llm.embed(["short", "word " * 300])
    with pytest.raises(UsageError, match="text 1 is empty"):
        llm.embed(["short", ""])
    assert llm.embed(["short"]).shape[0] == 1


def test_answer_and_translate(llm):
    context = "The letter was written by Ada Lovelace in 1843."
    assert "Ada Lovelace" in llm.answer("Who wrote the letter?", context, max_tokens=32).text
    assert llm.translate("Good morning", "French", max_tokens=16).text
