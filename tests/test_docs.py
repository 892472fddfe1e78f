"""Examples of the documentation do what they say."""

from __future__ import annotations

import re
import shlex
from io import BytesIO, TextIOWrapper
from math import prod
from pathlib import Path

import pytest
from command_line import command
from make_gguf import make_model
from make_tokenizer import TEXT
from test_chat_answers import CHATML
from test_convert import make_folder

from edgellama.convert.recipes import RECIPES, choose_formats
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS

DOCS = Path(__file__).parents[1] / "docs"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CONVERT = DOCS / "convert.md"


def test_examples(capsys, tmp_path, monkeypatch):
    """Blocks of `console`: what is behind "$ " is run, and prints the lines that follow."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "my-model", "llama")
    Path("text.txt").write_text("\n".join(TEXT * 3), "utf-8")
    blocks = re.findall(r"```console\n(.*?)```", CONVERT.read_text("utf-8"), re.DOTALL)
    examples = re.findall(r"^\$ (.+)\n((?:(?!\$ ).+\n)*)", "".join(blocks), re.MULTILINE)
    assert len(examples) == sum(block.count("$ edgellama") for block in blocks) > 10
    for line, expected in examples:
        program, *arguments = shlex.split(line)
        assert program == "edgellama"
        status, stdout, stderr = command(capsys, *arguments)
        assert status == 0, f"{line}\n{stderr}"
        if arguments[0] != "run":
            assert stdout == expected, line


@pytest.mark.parametrize(
    "name", ["sampling.md", "constrained.md", "tasks.md", "chat.md", "caches.md"]
)
def test_examples_on_a_model(name, capsys, tmp_path, monkeypatch):
    """Blocks of `python` run one after the other, and lines of `console`; there is a model.gguf."""
    monkeypatch.chdir(tmp_path)
    template = CHATML if name == "chat.md" else TEMPLATE
    make_model(Path("model.gguf"), keys={"tokenizer.chat_template": template})
    Path("chat.json").write_text('[{"role": "user", "content": "Hello"}]')
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"Hello")))
    text = (DOCS / name).read_text("utf-8")
    Path("in.jsonl").write_text("".join(re.findall(r"```json\n(.*?)```", text, re.DOTALL)), "utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, name, "exec"), names)
    names["llm"].close()
    for line in re.findall(r"^\$ edgellama (.+)$", text, re.MULTILINE):
        status, _, stderr = command(capsys, *shlex.split(line))
        assert status == 0, f"{line}\n{stderr}"


def shapes(width: int, ffn: int, n_layers: int, kv: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """The matrices of a Llama 3."""
    out = {"token_embd": (width, 128256)} | ({} if tied else {"output": (width, 128256)})
    sizes = {
        "attn_q": (width, width), "attn_k": (width, kv), "attn_v": (width, kv),
        "attn_output": (width, width), "ffn_gate": (width, ffn), "ffn_up": (width, ffn),
        "ffn_down": (ffn, width),
    }  # fmt: skip
    return out | {f"blk.{i}.{name}": size for i in range(n_layers) for name, size in sizes.items()}


@pytest.mark.parametrize("type_name", RECIPES)
def test_bits_per_weight(type_name):
    """The table of types, computed."""
    row = re.search(rf"^\| `{type_name}` \|(.+)\|$", CONVERT.read_text("utf-8"), re.MULTILINE)
    assert row
    of_format, *of_files = map(float, row[1].split("|"))
    base = FORMATS[RECIPES[type_name].base]
    assert of_format == 8 * base.nbytes / base.n_weights
    for said, shape in zip(
        of_files,
        (shapes(2048, 8192, 16, 512, True), shapes(4096, 14336, 32, 1024, False)),
        strict=True,
    ):
        tensors = [NewTensor(f"{name}.weight", s, FORMATS["f16"]) for name, s in shape.items()]
        chosen = choose_formats(tensors, RECIPES[type_name], wide_groups=True)
        n = sum(prod(t.shape) for t in chosen)
        assert 8 * sum(t.nbytes for t in chosen) / n == pytest.approx(said, abs=0.006)
