"""`edgellama convert` and `quantize` from end to end: folders in, files that run."""

from __future__ import annotations

import json
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from checkpoints import CONFIGS, config_of, make_checkpoint, random_weights, write_gguf
from command_line import command, refused
from make_checkpoint import safetensors
from make_gguf import make_model
from make_tokenizer import byte_level
from test_families import logits_of

from edgellama.convert.convert import size_label
from edgellama.convert.encoder import Encoder
from edgellama.convert.families import plan
from edgellama.convert.recipes import RECIPES
from edgellama.gguf import open_gguf
from edgellama.kernels.blocks import FORMATS


def make_folder(folder, family: str):
    """A checkpoint as Hugging Face has it."""
    folder.mkdir()
    config = config_of(family)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(random_weights(config)))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 0]}')
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    return byte_level(folder, "llama3", 290, chat_template="{{ messages[0].content }}")


@pytest.fixture
def run(capsys):
    return partial(command, capsys)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(run, family, tmp_path):
    folder, out = make_folder(tmp_path / family, family), tmp_path / "m.gguf"
    status, stdout, stderr = run("convert", folder, "-o", out, "--type", "f32")
    assert (status, stdout) == (0, ""), stderr
    config = config_of(family)
    planned = plan(make_checkpoint(config, random_weights(config)))
    assert (logits_of(out) == logits_of(write_gguf(tmp_path / "plan.gguf", planned))).all()
    with open_gguf(out) as gguf:
        assert gguf.metadata["general.name"] == family
        assert gguf.metadata["general.license"] == "apache-2.0"
        assert gguf.metadata["general.file_type"] == 0
        assert gguf.metadata["tokenizer.ggml.eos_token_id"] == 1
        assert gguf.metadata["tokenizer.ggml.eot_token_id"] == 0
        assert gguf.metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
        assert gguf.metadata["general.sampling.temp"] == pytest.approx(0.6)
    status, stdout, _ = run("run", out, "-p", "the", "--raw", "-n", "3", "--temp", "0")
    assert status == 0


def test_name_and_size(run, tmp_path):
    """Hugging Face's cache calls folders by commit; the repository's name is above them."""
    (tmp_path / "models--org--m" / "snapshots").mkdir(parents=True)
    folder = make_folder(tmp_path / "models--org--m" / "snapshots" / "0f3", "llama")
    for options, name in (([], "org/m"), (["--name", "Mine"], "Mine")):
        assert run("convert", folder, "-o", tmp_path / f"{len(options)}.gguf", *options)[0] == 0
        with open_gguf(tmp_path / f"{len(options)}.gguf") as gguf:
            assert gguf.metadata["general.name"] == name
            assert gguf.metadata["general.size_label"].endswith("K")
    counts = (134_515_008, 1_235_814_400, 9_960_000, 999_999_999_999, 70_553_706_496, 260_032)
    assert [size_label(n) for n in counts] == ["135M", "1.2B", "10M", "1000B", "71B", "260K"]


@pytest.mark.parametrize("type_name", RECIPES)
def test_every_type_runs_and_is_what_quantize_makes(run, type_name, tmp_path):
    folder = make_folder(tmp_path / "llama", "llama")
    direct, plain, again = (tmp_path / f"{name}.gguf" for name in ("direct", "plain", "again"))
    assert run("convert", folder, "-o", direct, "--type", type_name)[0] == 0
    assert run("convert", folder, "-o", plain, "--type", "f32")[0] == 0
    assert run("quantize", plain, again, type_name)[0] == 0
    status, text, _ = run("gguf", "diff", direct, again)
    assert (status, text) == (0, "no difference\n")
    close = np.corrcoef(logits_of(direct).ravel(), logits_of(plain).ravel())[0, 1]
    # Random weights carry errors on as they are; other weights would give about 0.
    assert close > (0.95 if type_name[:2] in ("f3", "f1", "bf", "q5", "q6", "q8") else 0.7)


@pytest.mark.parametrize("source", FORMATS)
def test_any_format_is_quantized_from(run, source, tmp_path):
    model = make_model(tmp_path / "m.gguf", format_name=source)
    status, _, stderr = run("quantize", model, tmp_path / "q.gguf", "q8_0")
    assert status == 0
    assert ("was quantized before" in stderr) == (source not in ("f32", "f16", "bf16", "q8_0"))
    name = "blk.0.attn_q.weight"
    with open_gguf(model) as a, open_gguf(tmp_path / "q.gguf") as b, Encoder(1) as encoder:
        rows = encoder.decode(source, a.data(name).reshape(256, -1))
        if source == "q8_0":
            assert (a.data(name) == b.data(name)).all()
        else:
            assert (encoder.encode("q8_0", rows).reshape(-1) == b.data(name)).all()


def test_a_copy_is_exact(run, tmp_path):
    """What keeps its format keeps its bytes, and all metadata but the type."""
    model = make_model(tmp_path / "m.gguf", format_name="q8_0")
    assert run("quantize", model, tmp_path / "q.gguf", "q8_0")[0] == 0
    status, text, _ = run("gguf", "diff", model, tmp_path / "q.gguf")
    assert status == 1
    assert {line.partition(":")[0] for line in text.splitlines()} == {
        "general.file_type", "general.quantization_version",
    }  # fmt: skip


def test_options(run, tmp_path):
    model, out = make_model(tmp_path / "m.gguf", format_name="f32", tied=False), tmp_path / "q.gguf"
    options = ["--tensor-type", "ffn_up=q8_0", "--keep-output", "--pure", "-t", "1"]
    status, stdout, stderr = run("quantize", model, out, "q4_K_M", *options)
    assert (status, stdout) == (0, ""), stderr
    assert "MB" in stderr
    assert "bits per weight" in stderr
    with open_gguf(out) as gguf:
        kinds = {name: t.type_name for name, t in gguf.tensors.items()}
        assert gguf.metadata["general.file_type"] == 15
    assert kinds["output.weight"] == "f32"
    assert kinds["blk.0.ffn_up.weight"] == "q8_0"
    assert kinds["blk.0.attn_v.weight"] == kinds["token_embd.weight"] == "q4_k"
    assert run("quantize", model, out, "q4_0", "--target-bpw", "5", "--force")[0] == 0
    with open_gguf(out) as gguf:
        n = sum(t.n_weights for t in gguf.tensors.values())
        assert 4.5 < 8 * sum(t.nbytes for t in gguf.tensors.values()) / n <= 5
        by_type: dict[str, int] = {}
        for t in gguf.tensors.values():
            by_type[t.type_name] = by_type.get(t.type_name, 0) + t.n_weights
        commonest = max(by_type, key=by_type.__getitem__)
        file_types = [r.file_type for r in RECIPES.values() if r.base == commonest]
        assert gguf.metadata["general.file_type"] in file_types


def test_reports(run, tmp_path):
    model = make_model(tmp_path / "m.gguf", format_name="f32")
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    assert run("quantize", model, tmp_path / "a.gguf", "q4_0", "--report", page)[0] == 0
    assert run("quantize", model, tmp_path / "b.gguf", "q8_0", "--report", data)[0] == 0
    document = json.loads(data.read_text())
    by_name = {t["name"]: t for t in document["tensors"]}
    assert document["nbytes"] == sum(t["nbytes"] for t in document["tensors"])
    assert by_name["output_norm.weight"]["relative_error"] is None
    assert 0.001 < by_name["blk.0.attn_q.weight"]["relative_error"] < 0.01  # 1 / (127 sqrt 12) x ~2
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page.read_text())
    assert tags.count("svg") == len(by_name)


def test_refusals(capsys, run, tmp_path):
    model, out = make_model(tmp_path / "m.gguf", format_name="f32"), tmp_path / "out.gguf"
    folder = make_folder(tmp_path / "llama", "llama")
    say = partial(refused, capsys)
    assert "no type is called 'q9'; types: f32" in say("quantize", model, out, "q9")
    assert "is a file to be read" in say("quantize", model, model, "q4_0", "--force")
    assert "is no folder; make it" in say("quantize", model, tmp_path / "no" / "x", "q4_0")
    assert "cannot be opened" in say("quantize", tmp_path / "none.gguf", out, "q4_0")
    assert "is no REGEX=FORMAT" in say("quantize", model, out, "q4_0", "--tensor-type", "q4_0")
    report = say("quantize", model, out, "q4_0", "--report", tmp_path / "r.txt")
    assert "must end in .json or .html" in report
    assert "edgellama quantize changes its types" in say("convert", model, "-o", out)
    assert "holds no checkpoint" in say("convert", tmp_path, "-o", out)
    assert "--target-bpw 1 is too small" in say("quantize", model, out, "q4_0", "--target-bpw", "1")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt9"}, "model_type is 'gpt9'; edgellama converts: gemma"),
        ({"hidden_act": "relu9"}, "relu9"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.input_layernorm.weight is missing"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert message in say("convert", folder, "-o", out)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json and no tokenizer.model" in say("convert", folder, "-o", out)
    out.write_text("mine")
    assert "exists; give another name, or --force" in say("convert", folder, "-o", out)
    assert out.read_text() == "mine"


def test_weights_that_are_no_numbers_are_named(capsys, tmp_path):
    folder = make_folder(tmp_path / "llama", "llama")
    weights = random_weights(config_of("llama"))
    for value, message in (
        (np.nan, "NaNs or infinities"),
        (1e30, "too large to be encoded as q4_0"),
    ):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        (folder / "model.safetensors").write_bytes(safetensors(weights))
        said = refused(capsys, "convert", folder, "-o", tmp_path / "out.gguf", "--type", "q4_0")
        assert "blk.1.ffn_up.weight" in said
        assert message in said
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".*.part")]
