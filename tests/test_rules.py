"""House rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "gguf": {"gguf", "kernels", "errors"},
    "models": {"models", "gguf", "kernels", "errors"},
    "tokenizer": {"tokenizer", "errors"},
    "runtime": {"runtime", "models", "gguf", "kernels", "errors", "cpu", "catalog", "progress"},
    "errors": set(),
    "cpu": {"errors"},
    "progress": set(),
    "sampling": {"errors"},
    "stopping": {"errors"},
    "chat": {"errors"},
    "fetch": {"errors", "progress", "gguf"},
    "catalog": {"errors", "fetch"},
}
SOURCES = sorted(p for folder in ("edgellama", "kernels") for p in (ROOT / folder).rglob("*.py"))


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
            whole = [f"{module}.{alias.name}" for alias in node.names]
            names += whole if module == "edgellama" else [module]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_keep_to_their_rooms(path):
    parts = path.relative_to(ROOT).parts
    room = parts[0] if parts[0] == "kernels" else parts[1].removesuffix(".py")
    for name in imports(path):
        head, _, rest = name.partition(".")
        assert head not in ("kernels", "convert"), f"{name}: say edgellama.{name}"
        if head == "numba":
            assert room == "kernels", "only kernels may import numba"
        if head == "edgellama" and rest.partition(".")[0] in ("cli", "server"):
            assert room in ("cli", "server", "__main__"), f"{room} must not import {name}"
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


def in_git() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    if "cli" in path.parts:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A worker process answers on its stdout, which is a pipe.
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "serve_builds"]
    for node in ast.walk(tree):
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        assert called not in ("print", "breakpoint", "input"), f"line {node.lineno}: {called}()"


def test_no_file_names_a_path_of_one_machine():
    found = []
    for path in in_git():
        if path.suffix in (".gguf", ".npz", ".json", ".gz") or path.name == "test_rules.py":
            continue
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"(?<![\w.])/(root|home|Users|work|mnt|tmp)/\w+", text):
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert found == []


def test_the_version_is_one():
    import edgellama

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{edgellama.__version__}"' in text


def test_every_package_is_shipped():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in {path.parent.relative_to(ROOT) for path in SOURCES}:
        name = ".".join(folder.parts)
        name = name if name.startswith("edgellama") else f"edgellama.{name}"
        assert f'"{name}",' in text, f"pyproject.toml does not list {name}"


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_of_the_readme_runs(smollm2, capsys):
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_commands_of_the_readme_exist():
    from edgellama.cli import cli

    lines = [line for block in blocks("sh") for line in block.splitlines()]
    used = {line.split()[1] for line in lines if line.startswith("edgellama ")}
    assert used == set(cli.list_commands(None))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {line.split()[1] for line in lines if line.startswith("make ")} <= set(targets)


def best_s(*code: str) -> float:
    import time

    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["pull", "--help"]])
def test_light_commands_load_nothing_heavy(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path))
    check = f"""
import sys, edgellama.cli
sys.argv = ["edgellama", *{arguments!r}]
try:
    edgellama.cli.main()
except SystemExit as status:
    assert status.code in (None, 0)
bad = {{"numba", "llvmlite", "numpy", "rich", "jinja2", "tokenizers", "urllib.request"}}
assert not bad & set(sys.modules), bad & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_import_and_help_are_quick():
    bare = best_s("-c", "pass")
    assert best_s("-c", "import edgellama") - bare < 0.15
    assert best_s("-m", "edgellama", "--help") - bare < 0.15
