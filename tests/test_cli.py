"""The command line as a user meets it: whole processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import DATA
from make_gguf import make_model


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "edgellama", *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
        stdin=options.pop("stdin", subprocess.DEVNULL), **options,
    )  # fmt: skip


def test_run_answers_and_keeps_stdout_clean(smollm2):
    done = run("run", "-p", "What is the capital of France?", "-n", 24, "--temp", 0, "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "first token" in done.stderr
    again = run(
        "run", smollm2, "-p", "What is the capital of France?", "-n", 24, "--temp", 0, "-t", 1
    )
    assert again.stdout == done.stdout


def test_raw_reads_stdin(smollm2, tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text("One, two, three, four,")
    with open(prompt) as file:
        done = run("run", "--raw", "-n", 4, "--temp", 0, stdin=file)
    assert "five" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "absent-model", "-p", "x"],
        ["run", DATA / "gguf_bad" / "class_HEADER_BAD_MAGIC.gguf", "-p", "x"],
        ["run", DATA / "gguf_ok" / "le_no_tensors.gguf", "-p", "x"],
        ["run", DATA / "gguf_ok" / "be_default.gguf", "-p", "x"],
        ["run", "--temp", "nan", "-p", "x"],
        ["run", "-p", "word " * 400, "-c", "64"],
        ["verify", DATA / "gguf_bad" / "class_DATA_NOT_ENOUGH_DATA.gguf"],
        ["info", "/dev/null"],
        ["pull", "nothing-of-that-name"],
        ["rm", "nothing-of-that-name"],
        ["warmup", "--target", "z80"],
    ],
    ids=lambda a: str(a[1])[-24:],
)
def test_one_line_and_status_2(arguments, smollm2):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("edgellama: ")
    assert done.stderr.count("\n") == 1


def test_usage_errors():
    for arguments in (["run", "--nonsense"], ["dance"], ["run", "-n", "-3", "-p", "x"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_info_and_verify(smollm2, tmp_path):
    document = json.loads(run("info", smollm2, "--json").stdout)
    assert document["metadata"]["general.architecture"] == "llama"
    assert len(document["tensors"]) == 272
    assert run("verify", smollm2).returncode == 0
    for odd in ("le_default", "le_align64", "le_no_tensors"):
        assert run("info", DATA / "gguf_ok" / f"{odd}.gguf").returncode == 0
        assert run("verify", DATA / "gguf_ok" / f"{odd}.gguf").returncode == 0
    zero = DATA / "gguf_bad" / "class_TENSORS_ZERO_DIM.gguf"
    assert run("info", zero).returncode == run("verify", zero).returncode == 0


def test_verify_names_damaged_numbers(tmp_path):
    path = make_model(tmp_path / "m.gguf")
    from edgellama.gguf import open_gguf

    with open_gguf(path) as gguf:
        offset = gguf.tensors["blk.1.ffn_up.weight"].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x7f")
    done = run("verify", path)
    assert done.returncode == 2
    assert "blk.1.ffn_up.weight" in done.stderr


def test_offline_never_fetches(tmp_path):
    done = run("run", "--offline", "-p", "x", env=os.environ | {"EDGELLAMA_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "--offline" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_ctrl_c_ends_within_a_second(smollm2):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellama", "run", "-p", "Tell me a long story.", "--temp", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=10)
    assert time.monotonic() - start < 1.0
    assert process.returncode == 130
    assert b"Traceback" not in complaint


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
def test_ctrl_c_in_a_prompt_leaves_the_model_usable(smollm2):
    import threading

    from edgellama import LLM

    with LLM(smollm2, n_ctx=8192) as llm:
        ids = [int(i) for i in range(1000, 5000)]
        expected = llm.generate(ids[:50], max_tokens=8, temperature=0).tokens
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(ids, max_tokens=8, temperature=0)
        assert time.monotonic() - start < 1.5
        assert llm.generate(ids[:50], max_tokens=8, temperature=0).tokens == expected


def test_exit_without_close(smollm2):
    code = (
        f"from edgellama import LLM; m = LLM({str(smollm2)!r}); "
        "print(m.generate('Hi', max_tokens=2).text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == ""


# --- the frame ------------------------------------------------------------------------------------
def test_help_lists_every_command_and_its_own_help_agrees():
    top = run("--help").stdout
    for name in ("run", "pull", "list", "rm", "info", "verify", "bench", "doctor", "warmup"):
        assert f"  {name} " in top
        done = run(name, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"Usage: edgellama {name} ")


def test_an_unknown_command_lists_the_known():
    done = run("dance")
    assert "run, chat, pull, list, rm" in done.stderr


def test_list_and_rm(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    make_model(tmp_path / "models" / "mine.gguf")
    done = run("list")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert str(tmp_path) in rows["mine.gguf"]
    assert "not fetched" in rows["smollm2-135m"]
    assert "98.4 MB" in rows["smollm2-135m"]
    assert run("rm", "mine.gguf").returncode == 0
    assert "mine.gguf" not in run("list").stdout
    assert run("rm", "mine.gguf").returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgellama", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("edgellama: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes differ on Windows")
def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellama", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=30)
    process.stderr.close()
