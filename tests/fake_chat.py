"""A program: `edgellama chat` on a model whose answer is known, a token every few milliseconds.

python fake_chat.py ANSWER DELAY_S N_CTX [OPTIONS]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from test_llm import FakeEngine, install

from edgellama.cli import main

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if false %}<think></think>{% endif %}"
)


class SlowEngine(FakeEngine):
    """Takes its time."""

    delay_s = 0.0

    def evaluate(self, sequence: Any, ids: list[int]) -> Any:
        time.sleep(self.delay_s)
        return super().evaluate(sequence, ids)


if __name__ == "__main__":
    answer, delay_s, n_ctx, *options = sys.argv[1:]
    SlowEngine.delay_s = float(delay_s)
    install(pytest.MonkeyPatch(), SlowEngine(answer), template=TEMPLATE, trained=int(n_ctx))
    sys.argv = ["edgellama", "chat", "fake", "--temp", "0", *options]
    main()
