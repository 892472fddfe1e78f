"""`edgellama gguf split | merge | set | dump | diff`."""

from __future__ import annotations

import json
from functools import partial

import pytest
from command_line import command, refused
from make_gguf import make_model

from edgellama.convert.edit import parse_value, split
from edgellama.errors import UsageError
from edgellama.gguf import open_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("edit") / "m.gguf", format_name="q4_0")


@pytest.fixture
def run(capsys):
    """The command line: status, stdout and stderr of `edgellama gguf ...`."""
    return partial(command, capsys, "gguf")


def same(one, other) -> bool:
    with open_gguf(one) as a, open_gguf(other) as b:
        assert a.tensors.keys() == b.tensors.keys()
        assert a.metadata.keys() == b.metadata.keys()
        return all((a.data(n) == b.data(n)).all() for n in a.tensors) and all(
            a.raw_value(k) == b.raw_value(k) for k in a.metadata
        )


def test_split_and_merge(run, model, tmp_path):
    parts = split(model, str(tmp_path / "p"), max_tensors=5)
    assert [p.name for p in parts[:2]] == ["p-00001-of-00004.gguf", "p-00002-of-00004.gguf"]
    with open_gguf(parts[0]) as whole, open_gguf(model) as source:
        assert whole.tensors.keys() == source.tensors.keys()
    assert run("merge", parts[0], tmp_path / "whole.gguf")[0] == 0
    assert same(model, tmp_path / "whole.gguf")


def test_split_by_size(run, model, tmp_path, capsys):
    status, out, err = run("split", model, tmp_path / "p", "--max-size", "200k")
    assert status == 0, err
    assert len(out.split()) > 2
    again = refused(capsys, "gguf", "split", model, tmp_path / "p", "--max-size", "200k")
    assert "exists; give another name, or --force" in again
    bad = refused(capsys, "gguf", "split", model, tmp_path / "q", "--max-size", "huge")
    assert "is no size; write 500M or 2G" in bad


def test_set_keeps_types_and_everything_else(run, model, tmp_path):
    out = tmp_path / "out.gguf"
    status, _, err = run(
        "set", model, "general.name=new", "llama.context_length=99", "my.flag=true",
        "--remove", "tokenizer.ggml.pre", "-o", out,
    )  # fmt: skip
    assert status == 0, err
    with open_gguf(out) as new, open_gguf(model) as old:
        assert new.metadata["general.name"] == "new"
        assert new.metadata["my.flag"] is True
        assert new.metadata["llama.context_length"] == 99
        key = "llama.context_length"
        assert new.raw_value(key).data[:4] == old.raw_value(key).data[:4]
        assert "tokenizer.ggml.pre" not in new.metadata
        assert all((new.data(n) == old.data(n)).all() for n in old.tensors)
    status, text, _ = run("diff", model, out)
    assert status == 1
    assert "general.name: 'm' -> 'new'" in text
    assert "my.flag: only in out.gguf" in text


def test_set_in_place_and_bad_input(run, model, tmp_path, capsys):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    assert run("set", copy, "general.name=x")[0] == 0
    assert open_gguf(copy).metadata["general.name"] == "x"
    for arguments, message in (
        (["a"], "is no KEY=VALUE"),
        ([], "nothing to set"),
        (["--remove", "no.key"], "has no key 'no.key' to remove"),
        (["llama.context_length=many"], "'many' is no u32"),
        (["tokenizer.ggml.tokens=x"], "holds an array"),
        (["x=1", "--type", "u128"], "'u128' is no value type"),
    ):
        assert message in refused(capsys, "gguf", "set", copy, *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["copy.gguf"]


def test_typed_values():
    assert parse_value("3") == 3
    assert parse_value("0.5") == 0.5
    assert parse_value("plain text") == "plain text"
    assert parse_value("3", "str") == "3"
    assert parse_value("0x10", "u8").data[-1] == 16
    with pytest.raises(UsageError, match="'300' is no u8"):
        parse_value("300", "u8")


def test_dump(run, model, capsys):
    document = json.loads(run("dump", model, "--json")[1])
    assert document["metadata"]["general.architecture"] == "llama"
    assert len(document["metadata"]["tokenizer.ggml.tokens"]) > 256  # whole arrays
    with open_gguf(model) as file:
        assert [t["name"] for t in document["tensors"]] == list(file.tensors)
    text = run("dump", model, "--key", "general.architecture")[1]
    assert text == 'general.architecture = "llama"\n'
    assert "has no key" in refused(capsys, "gguf", "dump", model, "--key", "no")


def test_diff_tells_how_far_tensors_are_apart(run, model, tmp_path):
    assert run("diff", model, model)[1] == "no difference\n"
    other = make_model(tmp_path / "other.gguf", format_name="q8_0", drop=["blk.1.ffn_up.weight"])
    status, text, _ = run("diff", model, other)
    assert status == 1
    assert "blk.1.ffn_up.weight: only in m.gguf" in text
    line = next(s for s in text.splitlines() if s.startswith("blk.0.attn_q.weight"))
    assert "q4_0 -> q8_0, relative RMS difference" in line
    assert 1.0 < float(line.split()[-1]) < 2.0  # other random weights of the same deviation
