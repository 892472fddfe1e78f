"""Which tensor gets which block format: the recipes that users know by name.

The rules are llama.cpp's (llama-quant.cpp), so that `q4_k_m` means here what it means there: values and
the second matrices of the feed-forward net get more bits, in all or in some of the layers, and rows that
are no whole number of blocks get a format with smaller ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from edgellama.errors import UsageError
from edgellama.gguf.writer import NewTensor
from edgellama.kernels.blocks import FORMATS, BlockFormat


class Layers(NamedTuple):
    """What rules look at: the layer, how many there are, and two facts of the model."""

    layer: int
    n_layers: int
    wide_groups: bool  # four or more query heads share keys and values
    has_importance: bool


Condition = Callable[[Layers], bool]


def _always(_: Layers) -> bool:
    return True


def _first(n: int) -> Condition:
    return lambda at: at.layer < n


def _first_part(n: int) -> Condition:
    return lambda at: at.layer < at.n_layers // n


def _more_bits(at: Layers) -> bool:
    """The first and last eighth, and every third layer between them."""
    eighth = at.n_layers // 8
    inner = eighth <= at.layer < 7 * at.n_layers // 8
    return not inner or (at.layer - eighth) % 3 == 2


def _wide_groups(at: Layers) -> bool:
    return at.wide_groups


def _blind_first_eighth(at: Layers) -> bool:
    return not at.has_importance and _first_part(8)(at)


def _weighted_first_eighth(at: Layers) -> bool:
    return at.has_importance and _first_part(8)(at)


Rules = tuple[tuple[Condition, str], ...]
"""The first whose condition holds names the format."""


class Recipe(NamedTuple):
    """A named mix: the ordinary format, and rules for the three roles that may differ from it."""

    base: str
    file_type: int  # general.file_type
    attn_v: Rules = ()  # also fused q, k and v
    ffn_down: Rules = ()
    attn_output: Rules = ()


RECIPES: dict[str, Recipe] = {
    "f32": Recipe("f32", 0),
    "f16": Recipe("f16", 1),
    "bf16": Recipe("bf16", 32),
    "q4_0": Recipe("q4_0", 2, ffn_down=((_weighted_first_eighth, "q4_1"),)),
    "q4_1": Recipe("q4_1", 3),
    "q5_0": Recipe("q5_0", 8, ffn_down=((_weighted_first_eighth, "q5_1"),)),
    "q5_1": Recipe("q5_1", 9),
    "q8_0": Recipe("q8_0", 7),
    "q2_k": Recipe(
        "q2_k", 10, ((_wide_groups, "q4_k"), (_always, "q3_k")), ((_always, "q3_k"),),
        ((_always, "q3_k"),),
    ),
    "q2_k_s": Recipe("q2_k", 21, ((_wide_groups, "q4_k"),), ((_first_part(8), "q4_k"),)),
    "q3_k_s": Recipe("q3_k", 11),
    "q3_k_m": Recipe(
        "q3_k", 12, ((_first(2), "q5_k"), (_always, "q4_k")),
        ((_first_part(16), "q5_k"), (_always, "q4_k")), ((_always, "q4_k"),),
    ),
    "q3_k_l": Recipe(
        "q3_k", 13, ((_always, "q5_k"),), ((_always, "q5_k"),), ((_always, "q5_k"),)
    ),
    "q4_k_s": Recipe("q4_k", 14, ((_first(4), "q5_k"),), ((_first_part(8), "q5_k"),)),
    "q4_k_m": Recipe("q4_k", 15, ((_more_bits, "q6_k"),), ((_more_bits, "q6_k"),)),
    "q5_k_s": Recipe("q5_k", 16),
    "q5_k_m": Recipe("q5_k", 17, ((_more_bits, "q6_k"),), ((_more_bits, "q6_k"),)),
    "q6_k": Recipe("q6_k", 18),
    "iq4_nl": Recipe("iq4_nl", 25, ((_wide_groups, "q5_k"),), ((_blind_first_eighth, "q5_k"),)),
    "iq4_xs": Recipe("iq4_xs", 30, ((_wide_groups, "q5_k"),), ((_blind_first_eighth, "q5_k"),)),
    "mxfp4": Recipe("mxfp4", 38),
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""Names for which llama.cpp takes the middle one of three."""

_ROLES = ("attn_v", "attn_output", "ffn_down")
_KEPT = ("_norm.weight", "ffn_gate_inp.weight")
# What a format of large blocks gives way to where a row is no whole number of them.
_SMALLER = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
}  # fmt: skip
OUTPUT = ("output.weight",)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


class Choices(NamedTuple):
    """What the user asked for beside the recipe."""

    overrides: Sequence[tuple[str, str]] = ()  # (regular expression on the name, format)
    keep_output: bool = False  # leave output.weight as it is
    pure: bool = False  # the base format for all, no mix

    def override(self, tensor: NewTensor) -> str:
        """The format that the user asked for by the name of a tensor, or "".

        Raises: UsageError for rows that are no whole number of its blocks.
        """
        for pattern, name in self.overrides:
            if re.search(pattern, tensor.name) and not is_kept(tensor, self):
                format_, n_cols = FORMATS[name], tensor.shape[0]
                if n_cols % format_.n_weights:
                    raise UsageError(
                        f"{tensor.name} has {n_cols} columns; {name} needs a multiple of "
                        f"{format_.n_weights}. Name another format for it with --tensor-type"
                    )
                return name
        return ""


def check_overrides(choices: Choices, tensors: Iterable[NewTensor]) -> Choices:
    """Return the choices with formats by their full names.

    Raises: UsageError for an odd expression or format, and for an expression that fits no tensor whose
    format may be chosen.
    """
    names = [t.name for t in tensors if not is_kept(t, choices)]
    overrides = []
    for pattern, format_name in choices.overrides:
        overrides.append((pattern, find_format(format_name).name))
        try:
            found = any(map(re.compile(pattern).search, names))
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from None
        if not found:
            raise UsageError(
                f"--tensor-type {pattern!r} fits no matrix of this model; names are like {names[0]}"
                if names
                else "the model has no matrices"
            )
    return choices._replace(overrides=overrides)


def find_recipe(name: str) -> tuple[str, Recipe]:
    """Return the full name and the recipe that `name` means, in any case of letters.

    Raises: UsageError that lists the names.
    """
    key = name.lower()
    key = ALIASES.get(key, key)
    if key not in RECIPES:
        raise UsageError(f"no type is called {name!r}; types: {', '.join(RECIPES)}")
    return key, RECIPES[key]


def find_format(name: str) -> BlockFormat:
    """Return a block format by its name.

    Raises: UsageError that lists the names.
    """
    if name.lower() not in FORMATS:
        raise UsageError(f"no format is called {name!r}; formats: {', '.join(FORMATS)}")
    return FORMATS[name.lower()]


def choose_formats(
    tensors: Iterable[NewTensor],
    recipe: Recipe,
    choices: Choices = Choices(),  # noqa: B008
    *,
    wide_groups: bool,
    importance: Iterable[str] = (),
) -> list[NewTensor]:
    """Give every tensor its format; `tensors` come with the format of their source.

    Norms, biases and other vectors stay as they are.  `importance` names the tensors for which an
    importance matrix is at hand.  Raises: UsageError as `check_overrides`.
    """
    tensors = list(tensors)
    choices = check_overrides(choices, tensors)
    has_importance = bool(list(importance))
    tied = not any(t.name in OUTPUT for t in tensors)
    counts = _role_counts(tensors)
    out = []
    for tensor in tensors:
        if is_kept(tensor, choices):
            out.append(tensor)
            continue
        name = choices.override(tensor) or (recipe.base if choices.pure else "")
        if not name:
            name = _by_rule(tensor, recipe, tied, counts, wide_groups, has_importance)
        out.append(tensor._replace(format=FORMATS[_fitting(name, tensor.shape[0])]))
    return out


def is_kept(tensor: NewTensor, choices: Choices) -> bool:
    """Say whether a tensor stays as it is: vectors, norms, and what the user wants kept."""
    if len(tensor.shape) < 2 or not tensor.name.endswith("weight"):
        return True
    if choices.keep_output and tensor.name in OUTPUT:
        return True
    return any(part in tensor.name for part in _KEPT)


def _role(name: str) -> tuple[str, int]:
    """Return the role that rules go by, and the layer; fused projections count as values."""
    match = re.match(r"blk\.(\d+)\.(\w+)", name)
    if match is None:
        return "", 0
    return {"attn_qkv": "attn_v"}.get(match[2], match[2]), int(match[1])


def _role_counts(tensors: Iterable[NewTensor]) -> dict[str, int]:
    counts = dict.fromkeys(_ROLES, 0)
    n_layers = 0
    for tensor in tensors:
        role, layer = _role(tensor.name)
        n_layers = max(n_layers, layer + 1)
        if role in counts and tensor.name.endswith("weight"):
            counts[role] += 1
    return counts | {"ffn_down": n_layers}


def _by_rule(
    tensor: NewTensor, recipe: Recipe, tied: bool, counts: Mapping[str, int], wide_groups: bool,
    has_importance: bool,
) -> str:  # fmt: skip
    base = recipe.base
    if base in ("f32", "f16", "bf16"):
        return base
    if tensor.name in OUTPUT or (tied and tensor.name in EMBEDDINGS):
        whole = tensor.shape[0] % FORMATS[base].n_weights == 0
        return "q6_k" if whole and base not in ("q8_0", "mxfp4") else "q8_0"
    role, layer = _role(tensor.name)
    rules: Rules = getattr(recipe, role) if role in _ROLES else ()
    at = Layers(layer, counts.get(role, 0), wide_groups, has_importance)
    name = next((name for condition, name in rules if condition(at)), base)
    if role == "attn_v" and counts[role] == 80 and wide_groups:
        # Of 70 billion weights these are few, and every one serves eight heads.
        name = {"q3_k": "q5_k", "q4_k": "q5_k"}.get(name, name)
    return name


def _fitting(name: str, n_cols: int) -> str:
    """The format itself, or one of smaller blocks that rows of `n_cols` are a multiple of."""
    if n_cols % FORMATS[name].n_weights == 0:
        return name
    name = _SMALLER.get(name, name)
    return name if n_cols % FORMATS[name].n_weights == 0 else "f16"
