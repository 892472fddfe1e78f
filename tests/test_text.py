"""Tokenizer edges, sampling, stop strings, chat templates: everything above token ids."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from make_gguf import spm_vocabulary
from tokenizers import models

from edgellama.chat import ChatTemplate
from edgellama.errors import EdgeLlamaError, ModelFileError, TemplateError, UsageError
from edgellama.sampling import Sampler, SamplingOptions
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


def spm_metadata(**changes):
    metadata = spm_vocabulary(330)
    for key, kind in (("scores", np.float32), ("token_type", np.int32)):
        metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"], kind)
    metadata.update({f"tokenizer.ggml.{k}": v for k, v in changes.items()})
    return {k: v for k, v in metadata.items() if v is not None}


BYTES = list(byte_of_character())
IDS = ("bos", "eos", "eot", "eom", "unknown")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model"),
        ({"model": 1}, "model"),
        ({"model": "wordpiece"}, "wordpiece"),
        ({"tokens": None}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": np.zeros(3)}, "tokens"),
        ({"tokens": [*BYTES, "x" * 16385]}, r"tokens\[256\] has 16385 characters"),
        ({"token_type": np.array([1, 1], np.int32)}, "token_type has 2 entries"),
        ({"token_type": np.ones(258, np.int32)}, "token_type has 258 entries"),
        ({"token_type": np.ones(257, np.float32)}, "token_type has the wrong element type float32"),
        ({"token_type": np.ones(257, bool)}, "token_type has the wrong element type bool"),
        ({"token_type": ["1"] * 257}, "token_type has the wrong element type"),
        ({"token_type": 1}, "token_type has the wrong element type"),
        ({"token_type": np.full(257, 9, np.int32)}, r"token_type\[0\] is 9"),
        ({"token_type": np.full(257, -1, np.int32)}, r"token_type\[0\] is -1"),
        *[({f"{key}_token_id": i}, f"{key}_token_id is")
          for key in IDS for i in (257, -1, (1 << 32) - 1, 1.0, True, "1", np.zeros(2))],
        *[({f"add_{key}": x}, f"add_{key} is")
          for key in ("bos_token", "eos_token", "space_prefix") for x in (1, "true", np.ones(2))],
        ({"pre": "unheard-of"}, "unheard-of"),
        ({"pre": "x" * 1000}, "pre is"),
        ({"pre": 3}, "pre is 3"),
        ({"pre": np.zeros(3)}, "pre is an array"),
        ({"merges": ["ab"]}, r"merges\[0\]"),
        ({"merges": ["a b"]}, r"merges\[0\]"),
        ({"merges": [""]}, r"merges\[0\]"),
        ({"merges": [" "]}, r"merges\[0\]"),
        ({"merges": ["a "]}, r"merges\[0\]"),
        ({"merges": np.zeros(3)}, "merges is an array"),
        ({"merges": "a b"}, "merges is 'a b'"),
        *[({"tokens": [*BYTES, text], "token_type": np.array([1] * 256 + [6], np.int32)},
           r"tokens\[256\] is a byte token")
          for text in ("<end>", "<0x-1>", "<0xZZ>", "<0x1>", "<0x001>", "<0x+1>", "<0x 1>", "0x41", "",
                       "<0x41> ", "<0x\u0661\u0661>")],
    ],
)  # fmt: skip
def test_bad_tokenizers_are_named(changes, named):
    with pytest.raises(ModelFileError, match=named) as error:
        load_tokenizer(bpe_metadata(**changes))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": np.zeros(329, np.float32)}, "scores has 329 entries"),
        ({"scores": np.zeros(331, np.float32)}, "scores has 331 entries"),
        *[({"scores": np.zeros(330, kind)}, "scores has the wrong element type")
          for kind in (np.uint8, np.int32, np.float64, bool)],
        ({"scores": ["0"] * 330}, "scores has the wrong element type"),
        ({"scores": np.full(330, np.nan, np.float32)}, "scores holds"),
        ({"scores": np.full(330, -np.inf, np.float32)}, "scores holds"),
        ({"token_type": np.full(330, 6, np.int32)}, r"tokens\[0\] is a byte token"),
    ],
)  # fmt: skip
def test_bad_sentencepiece_vocabularies_are_named(changes, named):
    with pytest.raises(ModelFileError, match=named) as error:
        load_tokenizer(spm_metadata(**changes))
    assert str(error.value).isprintable()


def test_odd_vocabularies_that_work():
    """What is unused or ambiguous, and harmless: it neither stops a model nor breaks its text."""
    text = "ab ba <end> \0\n"
    merges = ["a b", "b a", "ab a", "a ba", "ab ab", "aba b"]  # each makes what others split
    for changes in (
        {"padding_token_id": 1 << 31},  # not used here; older files have such
        {"tokens": [*BYTES, "a"]},
        {"tokens": [*BYTES, ""]},
        {"tokens": [*BYTES[:-1], "\ufffd", "\ufffd"]},
        {"tokens": [*BYTES, "<end>", "ab", "ba", "aba", "abab"], "merges": merges * 2,
         "token_type": np.array([1] * 256 + [3] + [1] * 4, np.int32)},
    ):  # fmt: skip
        tokenizer = load_tokenizer(bpe_metadata(**changes))
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.n_vocab for i in ids)
        assert tokenizer.decode(ids) == text
    tokenizer = load_tokenizer(spm_metadata(padding_token_id=-1))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merging_is_the_tokenizers_librarys():
    """Random vocabularies, in which merges overlap, repeat and cannot all be reached."""
    rng = random.Random(1)
    n_merged = 0
    for _ in range(200):
        tokens, merges = list("abc"), []
        for _ in range(rng.randrange(1, 60)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            merges.append(pair)
            tokens.append("".join(pair))
        rng.shuffle(merges)
        tokens = list(dict.fromkeys(tokens))
        ids = {token: i for i, token in enumerate([*BYTES, *tokens[3:]])}
        library = models.BPE(vocab=ids, merges=list(dict.fromkeys(merges)))
        ours = load_tokenizer(
            bpe_metadata(
                tokens=list(ids), token_type=None, merges=[" ".join(pair) for pair in merges]
            )
        )
        for _ in range(10):
            text = "".join(rng.choices("abcd", k=rng.randrange(1, 30)))
            expected = [token.id for token in library.tokenize(text)]
            assert ours.encode(text) == expected, (text, merges)
            n_merged += len(expected) < len(text)
    assert n_merged > 500


def test_a_million_merges_of_one_pair():
    start = time.monotonic()
    types = np.array([1] * 256 + [3, 1], np.int32)
    tokens = [*BYTES, "<end>", "ab"]
    tokenizer = load_tokenizer(
        bpe_metadata(tokens=tokens, token_type=types, merges=["a b"] * 1_000_000)
    )
    assert tokenizer.encode("abab") == [257, 257]
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "pre",
    ["gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm", "falcon", "default", "tekken", "gpt-4o",
     "deepseek-v3", "bloom", "viking"],
)  # fmt: skip
def test_texts_that_make_patterns_backtrack(pre):
    tokenizer = load_tokenizer(bpe_metadata(pre=pre))
    start = time.monotonic()
    for text in (" " * 65536, " " * 65536 + "x", "\n " * 32768, "9" * 65536, "!\n" * 32768):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - start < 10


def test_long_texts_for_sentencepiece_end_soon():
    tokenizer = load_tokenizer(spm_metadata())
    start = time.monotonic()
    for text in (" " * 65536, "t" * 1_000_000, "\0" * 1000, "世" * 10_000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.monotonic() - start < 20


def test_bytes_that_never_become_a_character():
    """Across streamed tokens, where the next one may be special or never come."""
    tokenizer = load_tokenizer(spm_metadata())
    byte = {b: i for i, b in tokenizer.vocab.byte_of.items()}
    stream = tokenizer.stream()
    given = [0xE4, 0xB8, 0x41, 0xFF, 0xC3, 0xA9, 0xED, 0xA0, 0x80, 0xF0, 0x9F, 0x98]
    out = "".join(stream.feed(byte[b]) for b in given) + stream.flush()
    assert out == bytes(given).decode(errors="replace")
    stream = tokenizer.stream()
    assert stream.feed(byte[0xE4]) + stream.feed(tokenizer.eos_id) + stream.feed(byte[0xB8]) == ""
    assert stream.feed(byte[0x96]) == "世"
    for token in (-1, tokenizer.n_vocab):
        with pytest.raises(UsageError, match=str(token)):
            tokenizer.decode([token], skip_special=False)


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
    ids, p = Sampler(SamplingOptions(temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)).candidates(
        logits
    )
    assert ids.tolist() == [1, 3]
    assert p == pytest.approx([4 / 7, 3 / 7], abs=1e-6)
    ids, _ = Sampler(SamplingOptions(temperature=1.0, top_k=0, top_p=0.65, min_p=0.0)).candidates(
        logits
    )
    assert ids.tolist() == [1, 3]
    ids, _ = Sampler(SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.6)).candidates(
        logits
    )
    assert ids.tolist() == [1, 3]


def test_seeds_and_greedy():
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    draws = [[s.sample(logits) for _ in range(20)] for s in (Sampler(seed=4), Sampler(seed=4))]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1
    assert Sampler(SamplingOptions(temperature=0.0)).sample(logits) == int(logits.argmax())


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": 999999}, {"top_p": -1.0},
     {"top_p": 2}, {"top_k": -5}, {"min_p": 1.5}, {"temperature": "0.7"}],
)  # fmt: skip
def test_bad_sampling_options(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SamplingOptions(**options)


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
