"""How JSON Schemas are kept: the JSON-Schema-Test-Suite, each case by the grammar it becomes.

    python benchmarks/json_schema.py JSON-Schema-Test-Suite.zip [--show]

A schema may be refused (GrammarError), which is safe.  Of those that are not, an invalid instance must be
refused (else it is "wrong open", and the schema should have been refused) and a valid one accepted in
some order of its properties (else "wrong closed": a model is kept from some valid answers).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from edgellama.errors import GrammarError
from edgellama.grammar import read_grammar
from edgellama.grammar.matcher import build

N_ORDERS = 720


def orders(value: Any) -> Iterator[Any]:
    """Yield a JSON value with its properties in every order."""
    if isinstance(value, dict):
        for keys in itertools.permutations(value):
            for values in itertools.product(*(list(orders(value[k])) for k in keys)):
                yield dict(zip(keys, values, strict=True))
    elif isinstance(value, list):
        for items in itertools.product(*map(list, map(orders, value))):
            yield list(items)
    else:
        yield value


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("--show", action="store_true", help="print what is refused, and why")
    arguments = parser.parse_args()
    totals = count(arguments.suite, arguments.show)
    columns = ("schemas", "refused", "right", "wrong open", "wrong closed")
    print("|".join(("| suite ", *(f" {c} " for c in columns), "")))
    print("|---" * (len(columns) + 1) + "|")
    for draft, found in totals.items():
        print("|".join((f"| {draft} ", *(f" {found[c]} " for c in columns), "")))


def count(path: str | Path, show: bool = False) -> dict[str, Counter[str]]:
    """Return the counts of each draft, of what it requires and of what is optional in it."""
    tokens = LLTokenizer("byte", slices=[])
    totals: dict[str, Counter[str]] = {}
    with zipfile.ZipFile(path) as suite:
        for name in sorted(suite.namelist()):
            found = re.fullmatch(r"tests/(draft[^/]+)/(optional/)?.*\.json", name)
            if found:
                draft = f"{found[1]} {'optional' if found[2] else 'required'}"
                for group in json.loads(suite.read(name)):
                    check(name, group, tokens, totals.setdefault(draft, Counter()), show)
    return totals


def check(
    name: str, group: dict[str, Any], tokens: LLTokenizer, count: Counter[str], show: bool
) -> None:
    """Count one schema and its instances."""
    count["schemas"] += 1
    try:
        grammar = read_grammar(json_schema=group["schema"])
        assert grammar is not None
        matcher = build(tokens, grammar)
    except GrammarError as error:
        count["refused"] += 1
        if show and "optional" not in name:
            print(f"{name}: {group['description']}: {error}")
        return
    for test in group["tests"]:
        accepted = False
        for instance in itertools.islice(orders(test["data"]), N_ORDERS):
            text = json.dumps(instance, ensure_ascii=False, separators=(",", ":")).encode()
            matcher.reset()
            if matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting():
                accepted = True
                break
        wrong = "wrong open" if accepted else "wrong closed"
        verdict = "right" if accepted == test["valid"] else wrong
        count[verdict] += 1
        if verdict == "wrong open" or (show and verdict != "right"):
            schema = json.dumps(group["schema"])
            print(f"{verdict} {name}: {schema} {json.dumps(test['data'])} {test['description']}")


if __name__ == "__main__":
    main()
