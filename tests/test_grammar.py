"""Constrained answers: what may be asked for, what is refused, and that answers keep to it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from command_line import command
from make_gguf import bpe_vocabulary, make_model, spm_vocabulary

from edgellama import LLM
from edgellama.errors import GrammarError, UsageError
from edgellama.grammar import Tokens, read_grammar
from edgellama.grammar.gbnf import gbnf_to_lark
from edgellama.tokenizer import load_tokenizer

SHARED = Path("/work/shared/data")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u4e2d"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def tokenizer_of(vocabulary):
    metadata = dict(vocabulary)
    for name, dtype in (("token_type", np.int32), ("scores", np.float32)):
        if f"tokenizer.ggml.{name}" in metadata:
            metadata[f"tokenizer.ggml.{name}"] = np.array(metadata[f"tokenizer.ggml.{name}"], dtype)
    return load_tokenizer(metadata)


def tokens_of(vocabulary):
    tokenizer = tokenizer_of(vocabulary(400))
    return tokenizer, Tokens(tokenizer)


TOKENIZERS = {"bpe": tokens_of(bpe_vocabulary), "spm": tokens_of(spm_vocabulary)}


def accepts(text: str, kind: str = "bpe", **options) -> bool:
    """Whether the tokens of a text, then an end, are allowed one after the other."""
    tokenizer, tokens = TOKENIZERS[kind]
    matcher = tokens.constrain(read_grammar(**options))
    for token in tokenizer.encode_inside(text):
        if not matcher.mask()[token]:
            return False
        matcher.accept(token)
    return bool(matcher.mask()[sorted(tokenizer.eog_ids)].all())


# --- what a grammar allows ------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({"regex": r"a/b[/\n]\\?"}, ["a/b/", "a/b\n\\"], ["a/b", "a/b/x", ""]),
        ({"choices": ["yes", "yes!", "n/o \u4e2d"]}, ["yes", "yes!", "n/o \u4e2d"], ["no", "yes!!"]),
        ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["(x", "", "x)"]),
        ({"grammar": 'root ::= "(" root ")" | [^()] #c'}, ["x", "((\u4e2d))"], ["(x", "xx"]),
        ({"response_format": {"type": "json_object"}}, ['{"a": [1, "\u4e2d\u6587"]}'], ["[1]", "{'a':1}"]),
        ({"json_schema": True}, ["1", "[null]"], ["nul"]),
        ({"json_schema": json.dumps(PERSON)}, ['{"name":"x","age":1}'], ['{"age":1,"name":"x"}']),
    ],
)  # fmt: skip
def test_accepts(kind, options, good, bad):
    assert [text for text in good if not accepts(text, kind, **options)] == []
    assert [text for text in bad if accepts(text, kind, **options)] == []


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"name":"x","age":1}', True), ('{ "name": "x", "age": 1 }', True),
        ('{\n  "name": "x",\n  "age": 1\n}', True), ('{  "name":"x","age":1}', False),
        ('{"name":"x","age":121}', False), ('{"name":"xxxxxx","age":1}', False),
        ('{"name":"x","age":1,"y":1}', False), (' {"name":"x","age":1}', False),
    ],
)  # fmt: skip
def test_schema(text, good):
    format_ = {
        "type": "json_schema",
        "json_schema": {"name": "p", "schema": PERSON, "strict": True},
    }
    assert accepts(text, response_format=format_) is good


@pytest.mark.parametrize(
    ("format_", "good", "bad"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31"]),
        ("time", ["23:59:59Z", "08:30:06.28-08:00"], ["24:00:00Z", "22:59:60Z", "08:30:06"]),
        ("date-time", ["1963-06-19T08:30:06Z"], ["2021-02-29T08:30:06Z", "1963-06-19"]),
        ("uuid", ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], ["2eb8aa08"]),
    ],
)  # fmt: skip
def test_formats(format_, good, bad):
    schema = {"type": "string", "format": format_}
    assert all(accepts(f'"{text}"', json_schema=schema) for text in good)
    assert not any(accepts(f'"{text}"', json_schema=schema) for text in bad)


def test_special_tokens_are_no_text():
    tokenizer, tokens = TOKENIZERS["bpe"]
    matcher = tokens.constrain(read_grammar(regex=r"(?s).*"))
    allowed = matcher.mask()
    assert allowed[256]  # the end
    for token in map(ord, "aZ"):
        assert allowed[token]
    matcher = tokens.constrain(read_grammar(regex=r"(?s).+"))
    assert not matcher.mask()[256]
    assert not any(matcher.mask()[i] for i in range(400) if tokenizer.is_special(i))


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"response_format": {"type": "xml"}}, "'xml'"),
        ({"response_format": "json_object"}, "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "'schema'"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices"),
        ({"choices": []}, "an array of 0"),
        ({"choices": "yes"}, "'yes'"),
        ({"choices": ["a", ""]}, "''"),
        ({"regex": 3}, "3"),
        ({"grammar": b"x"}, "grammar"),
    ],
)
def test_no_options(options, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        read_grammar(**options)


def nested(n):
    return '{"items":' * n + "{}" + "}" * n


def chain(n, sign):
    rules = "\n".join(f'r{i}{sign} "x" r{i + 1}' for i in range(n))
    return f'{"root" if "=" in sign else "start"}{sign} r0\n{rules}\nr{n}{sign} "a"'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": "[]"}, "an object is needed"),
        ({"json_schema": {"type": "strnig"}}, "strnig"),
        ({"json_schema": {"properties": {"a": {"maxLenght": 3}}}}, "#/properties/a has 'maxLenght'"),
        ({"json_schema": {"uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"not": {}}}, "'not'"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"minimum": 2}]}}, "oneOf"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json_schema": {"format": "colour"}}, "colour"),
        ({"json_schema": {"format": "hostname"}}, "hostname"),
        ({"json_schema": {"pattern": r"^[\S]$"}}, r"\S"),
        ({"json_schema": {"pattern": "(?<=a)b"}}, "look"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "http://127.0.0.1:9/x.json"),
        ({"json_schema": {"$ref": "#"}}, "no token"),
        ({"json_schema": {"minProperties": 2}}, "minProperties"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength"),
        ({"json_schema": {"items": {"$id": "x"}}}, "$id"),
        ({"json_schema": {"enum": ["\ud800"]}}, "surrogate"),
        ({"json_schema": {"enum": [f"value {i}" for i in range(100000)]}}, "too big"),
        ({"json_schema": nested(10000)}, "nested too deeply"),
        ({"json_schema": nested(150)}, "100 levels"),
        ({"json_schema": {"$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)}}}, "4000"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(" * 10000 + "a" + ")" * 10000}, "nest"),
        ({"regex": "a\\"}, "ends in a backslash"),
        ({"grammar": ""}, "empty"),
        ({"grammar": "start: start"}, "no token"),
        ({"grammar": 'start: "a" other'}, "other"),
        ({"grammar": 'start: %json {"uniqueItems": true}'}, "%json"),
        ({"grammar": chain(5000, ":")}, "1000 are allowed"),
        ({"grammar": chain(5000, " ::=")}, "1000 are allowed"),
        ({"grammar": "start: " + "(" * 10000 + '"a"' + ")" * 10000}, "deep"),
        ({"grammar": "root ::= " + "(" * 10000 + '"a"' + ")" * 10000}, "50 levels"),
    ],
)  # fmt: skip
def test_refused(options, said):
    """One line, soon, that names what is wrong."""
    start = time.perf_counter()
    with pytest.raises(GrammarError, match=re.escape(said)) as error:
        TOKENIZERS["bpe"][1].constrain(read_grammar(**options))
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "options",
    [
        {"json_schema": {"type": "string", "maxLength": 1000000}},
        {"json_schema": {"type": "array", "minItems": 100000, "items": {"type": "integer"}}},
        {"json_schema": nested(90)},
        {"grammar": chain(900, ":")},
        {"grammar": chain(900, " ::=")},
        {"choices": [f"choice {i}" for i in range(10000)]},
        {"grammar": 'start: start "a" | "a"'},
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    ],
)
def test_large_but_allowed(options):
    start = time.perf_counter()
    TOKENIZERS["bpe"][1].constrain(read_grammar(**options))
    assert time.perf_counter() - start < 5


def test_no_token_fits():
    vocabulary = spm_vocabulary(400)
    kept = [i for i, text in enumerate(vocabulary["tokenizer.ggml.tokens"]) if text[:3] != "<0x"]
    for name in ("tokens", "scores", "token_type"):
        values = vocabulary[f"tokenizer.ggml.{name}"]
        vocabulary[f"tokenizer.ggml.{name}"] = [values[i] for i in kept]
    tokens = Tokens(tokenizer_of(vocabulary))
    with pytest.raises(GrammarError, match="no token of the vocabulary"):
        tokens.constrain(read_grammar(choices=["\u4e2d"]))


# --- GBNF -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ('rule ::= "a"', "root"),
        ("root ::= other", "'other'"),
        ('root ::= "a"\nroot ::= "b"', "line 2 of the grammar: a second rule 'root'"),
        ('root ::= "a', "line 1"),
        ('root ::= ("a"', ") is needed"),
        ('root ::= "a")', "')'"),
        ('root ::= * "a"', "nothing before it"),
        ('root ::= "\\q"', "no character"),
        ('root ::= "\\ud800"', "no character"),
        ("root ::= [z-a]", "empty"),
        ("root ::= []", "no characters"),
        ('root ::= "a"{3,2}', "repetitions"),
    ],
)
def test_gbnf_refused(grammar, said):
    with pytest.raises(GrammarError, match=re.escape(said)):
        gbnf_to_lark(grammar)


def test_gbnf_characters():
    """Classes are not Rust's, escapes are llama.cpp's, names that differ by a sign are two rules."""
    grammar = 'root ::= [&&a-c--\\]] "\\u0041\\x42\\U0001F600/" a-b aB\na-b ::= "1"\naB ::= "2"'
    for first in "&abc-]":
        assert accepts(f"{first}AB\U0001f600/12", grammar=grammar)
    assert not accepts("dAB\U0001f600/12", grammar=grammar)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared grammars are not here")
def test_gbnf_of_llama_cpp():
    tokens = TOKENIZERS["bpe"][1]
    texts = [path.read_text("utf-8") for path in sorted((SHARED / "grammars").glob("*.gbnf"))]
    cases = json.loads((SHARED / "cases/gbnf_parse.json").read_text())
    texts += [case["grammar"] for case in cases["must_parse"]]
    for text in texts:
        if "<[1000]>" in text:  # more than these vocabularies have
            text = text.replace("1000", "65").replace("1001", "66")
        tokens.constrain(read_grammar(grammar=text))
    for case in cases["must_fail"]:
        with pytest.raises(GrammarError):
            tokens.constrain(read_grammar(grammar=case["grammar"]))


@pytest.mark.skipif(not SHARED.exists(), reason="the JSON-Schema-Test-Suite is not here")
def test_schema_suite():
    """No schema of the suite that is taken accepts an instance that is invalid."""
    script = Path(__file__).parents[1] / "benchmarks" / "json_schema.py"
    spec = importlib.util.spec_from_file_location("json_schema", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    totals = module.count(next((SHARED / "json_schema").glob("JSON-Schema-Test-Suite*.zip")))
    total = sum(totals.values(), Counter())
    assert total["wrong open"] == 0
    assert total["right"] >= 1980
    assert total["wrong closed"] <= 60
    assert total["refused"] <= 405


# --- answers --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammar") / "model.gguf"
    make_model(path)
    return path


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, seed=1) as llm:
        yield llm


@pytest.mark.parametrize("seed", range(6))
def test_answers_validate(llm, seed):
    done = llm.generate("x", json_schema=PERSON, temperature=1.5, top_k=0, seed=seed)
    assert done.finish_reason == "stop"
    person = json.loads(done.text)
    assert list(person)[:2] == ["name", "age"]
    assert len(person["name"]) <= 5
    assert 0 <= person["age"] <= 120
    assert set(person.get("tags", [])) <= {"a", "b\u4e2d"}


@pytest.mark.parametrize("seed", range(4))
def test_unicode_is_whole(llm, seed):
    done = llm.generate("x", regex="[\u4e00-\u9fff]{3}", temperature=2, top_k=0, seed=seed)
    assert re.fullmatch("[\u4e00-\u9fff]{3}", done.text)


def test_several_answers(llm):
    done = llm.generate("x", choices=["red", "green", "blue"], n=4, seed=1, temperature=5)
    assert {answer.text for answer in done} <= {"red", "green", "blue"}
    assert all(answer.finish_reason == "stop" for answer in done)


def test_cut_by_max_tokens(llm):
    done = llm.generate("x", json_schema=PERSON, max_tokens=3)
    assert done.finish_reason == "length"
    assert len(done.tokens) == 3


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 5}])
def test_speculation_changes_nothing(path, llm, options):
    """A text that the grammar makes repeat itself, so that guesses are right and wrong ones too."""
    options |= {"regex": "(?:abc[xyz]){12}", "max_tokens": 60}
    plain = llm.generate("abcxabcyabcz", **options)
    with LLM(path, draft="lookup") as guessing:
        guessed = guessing.generate("abcxabcyabcz", **options)
    assert plain.text == guessed.text
    assert guessed.timings.drafted_n > guessed.timings.accepted_n > 0


def test_errors_come_before_the_first_step(llm):
    with pytest.raises(GrammarError):
        llm.stream("x", json_schema={"not": {}})
    with pytest.raises(UsageError, match="ignore_eos"):
        llm.stream("x", choices=["a"], ignore_eos=True)


def test_import_costs_nothing(path):
    code = (
        "import sys; from edgellama import LLM\n"
        f"with LLM({str(path)!r}) as llm: llm.generate('x', max_tokens=1)\n"
        "assert not {'llguidance', 'edgellama.grammar'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- command line ---------------------------------------------------------------------------------
def test_run(capsys, tmp_path, path):
    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON), "utf-8")
    grammar = tmp_path / "ab.gbnf"
    grammar.write_text("root ::= [ab]{4}", "utf-8")
    run = ["run", str(path), "-p", "x", "--seed", "1"]
    for arguments, good in (
        (["--json-schema", str(schema)], lambda text: json.loads(text).keys() >= {"name", "age"}),
        (["--grammar", str(grammar)], lambda text: re.fullmatch("[ab]{4}\n", text)),
        (["--regex", "[0-9]{3}"], lambda text: re.fullmatch("[0-9]{3}\n", text)),
        (["--choice", "yes", "--choice", "no"], lambda text: text in ("yes\n", "no\n")),
        (["--json", "-n", "1"], lambda text: text == "{\n"),
    ):
        status, stdout, stderr = command(capsys, *run, *arguments)
        assert (status, bool(good(stdout))) == (0, True), (arguments, stdout, stderr)
    for arguments in (
        ["--json-schema", str(grammar)],
        ["--regex", "("],
        ["--json", "--regex", "a"],
    ):
        status, stdout, stderr = command(capsys, *run, *arguments)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1), (arguments, stderr)
