"""Tokenizer edges, sampling, stop strings, chat templates: everything above token ids."""

from __future__ import annotations

import time

import numpy as np
import pytest

from edgellama.chat import ChatTemplate
from edgellama.errors import EdgeLlamaError, ModelFileError, TemplateError, UsageError
from edgellama.sampling import Sampler
from edgellama.stopping import StopStrings
from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.bpe import byte_of_character


def bpe_metadata(**changes):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*byte_of_character(), "<end>"],
        "tokenizer.ggml.token_type": np.array([1] * 256 + [3], np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 256,
    }
    metadata.update({f"tokenizer.ggml.{k}": v for k, v in changes.items()})
    return metadata


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model"),
        ({"model": "wordpiece"}, "wordpiece"),
        ({"tokens": []}, "tokens"),
        ({"tokens": np.zeros(3)}, "tokens"),
        ({"token_type": np.array([1, 1], np.int32)}, "token_type"),
        ({"token_type": np.ones(257, np.float32)}, "token_type"),
        ({"token_type": np.full(257, 9, np.int32)}, "token_type"),
        ({"eos_token_id": 257}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"merges": ["ab"]}, r"merges\[0\]"),
        ({"merges": ["a b"]}, r"merges\[0\]"),
        ({"model": "llama"}, "scores"),
        ({"token_type": np.array([1] * 256 + [6], np.int32)}, r"tokens\[256\]"),
    ],
)
def test_bad_tokenizers_are_named(changes, named):
    with pytest.raises(ModelFileError, match=named):
        load_tokenizer(bpe_metadata(**changes))


def test_override_pre_helps_an_unknown_name():
    tokenizer = load_tokenizer(bpe_metadata(pre="unheard-of"), override_pre="gpt-2")
    assert tokenizer.decode(tokenizer.encode("héllo 世界")) == "héllo 世界"


def test_long_and_odd_texts_end_soon():
    tokenizer = load_tokenizer(bpe_metadata())
    start = time.monotonic()
    for text in (" " * 65536, "x" * 1_000_000, "\0" * 1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - start < 20
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_special_tokens_and_streaming():
    tokenizer = load_tokenizer(bpe_metadata())
    assert tokenizer.encode("<end>", parse_special=True) == [256]
    assert 256 not in tokenizer.encode("<end>")
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in tokenizer.encode("né世")]
    assert "".join(pieces) == "né世"
    assert "\ufffd" not in "".join(pieces)
    stream.feed(tokenizer.encode("世")[0])
    assert stream.flush() == "\ufffd"


# --- sampling -------------------------------------------------------------------------------------
def test_filters():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    ids, p = Sampler(1.0, top_k=2, top_p=1.0, min_p=0.0).candidates(logits)
    assert ids.tolist() == [1, 3]
    assert p == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    ids, _ = Sampler(1.0, top_k=0, top_p=0.65, min_p=0.0).candidates(logits)
    assert ids.tolist() == [1, 3]
    ids, _ = Sampler(1.0, top_k=0, top_p=1.0, min_p=0.6).candidates(logits)
    assert ids.tolist() == [1, 3]


def test_seeds_and_greedy():
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    draws = [[s.sample(logits) for _ in range(20)] for s in (Sampler(seed=4), Sampler(seed=4))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1
    assert Sampler(0.0).sample(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": 999999}, {"top_p": -1.0},
     {"top_p": 2}, {"top_k": -5}, {"min_p": 1.5}, {"seed": -1}, {"temperature": "0.7"}],
)  # fmt: skip
def test_bad_sampling_options(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampler(**options)


def test_nan_logits():
    with pytest.raises(EdgeLlamaError, match="finite"):
        Sampler().sample(np.array([0.0, np.nan], np.float32))


# --- stop strings ---------------------------------------------------------------------------------
def test_no_part_of_a_stop_string_leaks():
    stops = StopStrings(["END", "stop here"])
    out = "".join(stops.feed(c) for c in "an ENd, a st, then ENDless")
    assert out == "an ENd, a st, then "
    assert stops.stopped
    held = StopStrings(["abc"])
    assert held.feed("xab") == "x"
    assert held.flush() == "ab"
    with pytest.raises(UsageError):
        StopStrings([""])


# --- templates ------------------------------------------------------------------------------------
MESSAGES = [{"role": "user", "content": "hi"}]


def test_template_renders():
    source = "{% for m in messages %}[{{ m['role'] }}] {{ m.content | tojson }}{% endfor %}"
    assert ChatTemplate(source).render(MESSAGES) == '[user] "hi"'
    source = "{% generation %}{{ bos_token }}{{ thinking }}{% endgeneration %}"
    assert ChatTemplate(source, "<s>").render(MESSAGES, thinking="yes") == "<s>yes"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{% set x = messages.append(1) %}",
        "{% include 'passwd' %}",
    ],
)
def test_hostile_and_broken_templates(source):
    start = time.monotonic()
    with pytest.raises(TemplateError) as error:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5
