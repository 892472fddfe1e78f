"""Options that commands share, with llama.cpp's names, and help in groups.

`@model_options` above a command adds those of a model, which `open_model` takes out again, and
`@sampling_options` those of the sampler; these arrive by the names of `AnswerKeywords`, None where the
user said nothing: then the model file decides, or the default in brackets.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgellama.errors import UsageError
from edgellama.sampling.options import SAMPLERS

if TYPE_CHECKING:
    from edgellama.llm import LLM

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SAMPLING, _REPETITION, _FORM = "Sampling", "Repetition", "Form of the answer"
# Flag, name, type, group, help.
_OPTIONS: tuple[tuple[str, str, Any, str, str], ...] = (
    ("--temp", "temperature", float, _SAMPLING, "Temperature; 0 is greedy [0.8]."),
    ("--top-k", "top_k", int, _SAMPLING, "Keep the k most likely; 0 is off [40]."),
    ("--top-p", "top_p", float, _SAMPLING, "Keep this much probability; 1 is off [0.95]."),
    ("--min-p", "min_p", float, _SAMPLING, "Keep what is this near the best; 0 is off [0.05]."),
    ("--typical", "typical_p", float, _SAMPLING, "Keep what is as surprising as expected [1: off]."),
    ("--top-nsigma", "top_n_sigma", float, _SAMPLING, "Keep logits this near the best [-1: off]."),
    ("--min-keep", "min_keep", int, _SAMPLING, "Least that top-p, min-p, typical, XTC leave [0]."),
    ("--xtc-probability", "xtc_probability", float, _SAMPLING, "How often XTC acts [0: off]."),
    ("--xtc-threshold", "xtc_threshold", float, _SAMPLING, "XTC drops all likelier, but one [0.1]."),
    ("--mirostat", "mirostat", int, _SAMPLING, "Mirostat 1 or 2 in place of those [0: off]."),
    ("--mirostat-ent", "mirostat_tau", float, _SAMPLING, "Mirostat's target in bits [5]."),
    ("--mirostat-lr", "mirostat_eta", float, _SAMPLING, "Mirostat's learning rate [0.1]."),
    ("--dynatemp-range", "dynatemp_range", float, _SAMPLING, "Temperature +- this [0: off]."),
    ("--dynatemp-exp", "dynatemp_exponent", float, _SAMPLING, "Exponent of the entropy there [1]."),
    ("--samplers", "samplers", str, _SAMPLING, f"Their order [{';'.join(SAMPLERS)}]."),
    ("--repeat-last-n", "repeat_last_n", int, _REPETITION, "Tokens looked back; -1 is all [64]."),
    ("--repeat-penalty", "repeat_penalty", float, _REPETITION, "Divides logits of what was said [1: off]."),
    ("--presence-penalty", "presence_penalty", float, _REPETITION, "Taken off what was said [0]."),
    ("--frequency-penalty", "frequency_penalty", float, _REPETITION, "Taken off, each time it was said [0]."),
    ("--dry-multiplier", "dry_multiplier", float, _REPETITION, "DRY's strength [0: off]."),
    ("--dry-base", "dry_base", float, _REPETITION, "Times this for each token more [1.75]."),
    ("--dry-allowed-length", "dry_allowed_length", int, _REPETITION, "Repetition that is free [2]."),
    ("--dry-penalty-last-n", "dry_penalty_last_n", int, _REPETITION, "Tokens looked back [64]."),
)  # fmt: skip


class _Option(click.Option):
    """An option that knows under which heading it is shown."""

    def __init__(self, *names: Any, group: str, **rest: Any) -> None:
        super().__init__(*names, **rest)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help shows the options of a group under its name."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


_MODEL_OPTIONS = (
    click.option(
        "-t", "--threads", "n_threads", type=click.IntRange(1, 256), help="Threads; physical cores."
    ),
    click.option("-c", "--ctx", "n_ctx", type=click.IntRange(1), help="Context: most tokens of the text."),
    click.option(
        "--kv-type", type=click.Choice(["f16", "f32", "q8_0"]), default="f16", show_default=True,
        help="Type of cached keys and values.",
    ),
    click.option(
        "--draft", metavar="lookup|MODEL",
        help="Guess tokens ahead; same text, faster where it repeats (lookup) or MODEL is small.",
    ),
    click.option("--override-pre", metavar="NAME", help="Pre-tokenizer to use in place of the file's."),
    click.option("--chat-template", metavar="FILE|NAME", help="In place of the file's own."),
    click.option("--offline", is_flag=True, help="Never touch the network."),
)  # fmt: skip


def model_options(command: _Command) -> _Command:
    """Add the options of a model to a command."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def open_model(model: str | None, options: dict[str, Any]) -> LLM:
    """Open a model with its options, which are taken out of `options`."""
    from edgellama.llm import LLM

    names = ("n_threads", "n_ctx", "kv_type", "draft", "override_pre", "chat_template", "offline")
    own = {name: options.pop(name) for name in names}
    if own["chat_template"] is not None and Path(own["chat_template"]).is_file():
        own["chat_template"] = Path(own["chat_template"])
    return LLM(model, **own)


def sampling_options(command: _Command) -> _Command:
    """Add the options of sampling to a command."""
    last = [
        click.option(
            "--dry-sequence-breaker", "dry_sequence_breakers", multiple=True, metavar="TEXT",
            cls=_Option, group=_REPETITION, callback=_read_breakers,
            help="DRY starts anew after it; may be repeated; none for none.",
        ),
        click.option(
            "--logit-bias", multiple=True, metavar="TOKEN+BIAS", cls=_Option, group=_SAMPLING,
            callback=_read_bias, help="Such as 15-1.5 or ' no-inf'; may be repeated.",
        ),
        click.option(
            "--max-time", "max_time_s", type=float, metavar="SECONDS", cls=_Option,
            group=_SAMPLING, help="End the answer after this time.",
        ),
        click.option(
            "--ignore-eos", is_flag=True, cls=_Option, group=_SAMPLING,
            help="Go on where the model would end.",
        ),
        click.option(
            "--seed", type=int, metavar="N", cls=_Option, group=_SAMPLING,
            help="Random when left out.",
        ),
    ]  # fmt: skip
    for option in last:
        command = option(command)
    for flag, name, kind, group, text in reversed(_OPTIONS):
        metavar = {int: "N", float: "F", str: "NAMES"}[kind]
        option = click.option(
            flag, name, type=kind, metavar=metavar, cls=_Option, group=group, help=text
        )
        command = option(command)
    return command


def grammar_options(command: _Command) -> _Command:
    """Add the options of what an answer has to look like to a command."""
    options = [
        click.option(
            "--json", "response_format", is_flag=True, cls=_Option, group=_FORM,
            callback=lambda ctx, parameter, value: {"type": "json_object"} if value else None,
            help="A JSON object.",
        ),
        click.option(
            "--json-schema", metavar="FILE", cls=_Option, group=_FORM, callback=_read_file,
            help="JSON of this JSON Schema; - reads stdin.",
        ),
        click.option(
            "--grammar", metavar="FILE", cls=_Option, group=_FORM, callback=_read_file,
            help="A text of this grammar, Lark or GBNF; - reads stdin.",
        ),
        click.option(
            "--regex", metavar="REGEX", cls=_Option, group=_FORM,
            help="A text that this regular expression matches.",
        ),
        click.option(
            "--choice", "choices", multiple=True, metavar="TEXT", cls=_Option, group=_FORM,
            callback=lambda ctx, parameter, value: value or None,
            help="One of these texts; may be repeated.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _read_file(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    name = f"--{(parameter.name or '').replace('_', '-')}"
    data = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} {value} is no UTF-8 text: {error.reason}") from None


def _read_breakers(
    ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...] | None:
    return tuple(text for text in value if text != "none") if value else None


def _read_bias(
    ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[int | str, float] | None:
    out: dict[int | str, float] = {}
    for text in value:
        found = re.fullmatch(r"(.+?)([+-](?:inf|\d+\.?\d*|\.\d+))", text, re.DOTALL)
        if found is None:
            raise UsageError(f"--logit-bias {text!r} is not like 15043+1 or 15043-inf")
        token, bias = found.groups()
        out[int(token) if token.isdecimal() else token] = float(bias)
    return out or None
