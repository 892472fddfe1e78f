"""House rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from make_gguf import make_model

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "gguf": {"gguf", "kernels", "errors"},
    "models": {"models", "gguf", "kernels", "errors"},
    "tokenizer": {"tokenizer", "errors"},
    "convert": {
        "convert", "gguf", "kernels", "tokenizer", "errors", "catalog", "cpu", "fetch", "progress",
        "models", "runtime",
    },
    "runtime": {
        "runtime", "models", "gguf", "kernels", "errors", "cpu", "catalog", "progress", "__version__",
    },
}  # fmt: skip
SOURCES = sorted(
    p for folder in ("edgellama", "kernels", "convert") for p in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> list[str]:
    package = ["edgellama", *path.relative_to(ROOT).parts[:-1]]
    package = package[1:] if package[1:2] == ["edgellama"] else package
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += (
                [f"{module}.{a.name}" for a in node.names] if module == "edgellama" else [module]
            )
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_their_rooms(path):
    parts = path.relative_to(ROOT).parts
    room = parts[1].removesuffix(".py") if parts[0] == "edgellama" else parts[0]
    for name in imports(path):
        head, _, rest = name.partition(".")
        assert head not in ("kernels", "convert"), f"{name}: say edgellama.{name}"
        if head == "numba":
            assert room == "kernels", "only kernels may import numba"
        if head == "edgellama" and room in MAY_IMPORT and rest:
            assert rest.partition(".")[0] in MAY_IMPORT[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    if "kernels" in path.parts:
        return  # kernels are described where they are grouped
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def best_s(*code: str) -> float:
    import time

    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


def test_run_imports_only_what_it_needs(tmp_path):
    """Each of these takes 10 ms or more of a start."""
    model = make_model(tmp_path / "m.gguf")
    check = (
        "import sys; from edgellama.cli import main\n"
        f"sys.argv = ['edgellama', 'run', {str(model)!r}, *'--raw -p x -n 1 --temp 0'.split()]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "bad = {'concurrent.futures', 'jinja2', 'llvmlite', 'logging', 'numba', 'numpy.random', "
        "'rich', 'sentencepiece'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "assert 'edgellama.runtime.engine' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_import_and_help_are_light():
    check = (
        "import sys, edgellama, edgellama.cli; "
        "bad = {'numba', 'llvmlite', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    assert best_s("-m", "edgellama", "--help") < 0.15
    assert best_s("-c", "import edgellama") < 0.15
