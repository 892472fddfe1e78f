"""What an answer has to look like: JSON, a JSON Schema, a regular expression, a grammar, a choice.

`read_grammar` checks what a caller asked for, `Tokens` makes a `Constraint` (`generation.py`) of it for
every answer; the work is the llguidance library's, which is imported when a grammar is used.  What a
schema may say is in `schema.py`, llama.cpp's GBNF becomes Lark in `gbnf.py`.
Whatever cannot be kept to the letter is a GrammarError: an answer is never free where it was to be bound.
"""

from .matcher import Matcher, Tokens
from .source import read_grammar

__all__ = ["Matcher", "Tokens", "read_grammar"]
