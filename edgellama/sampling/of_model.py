"""Samplers of a model: the defaults of its file, and texts in options as its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .options import SamplingOptions, file_options, read_options
from .sampler import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from edgellama.tokenizer import Tokenizer

    from .dry import Breakers


class ModelSampling:
    """Makes the samplers of answers of one model."""

    def __init__(self, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self._metadata = metadata
        self._tokenizer = tokenizer
        self._known_breakers: dict[tuple[str, ...], Breakers] = {}

    def read(self, given: Mapping[str, Any], ignore_eos: bool = False) -> SamplingOptions:
        """Check options by name, which go before those of the file.

        Raises: UsageError, ModelFileError when it is the file's that cannot be used.
        """
        given = {**given, **file_options(self._metadata, given)}
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping):
            given["logit_bias"] = {
                token: value for key, value in bias.items() for token in self._tokens(key)
            }
        options = read_options(given)
        if ignore_eos:
            ban = dict.fromkeys(self._tokenizer.eog_ids, -math.inf)
            options = replace(options, logit_bias={**options.logit_bias, **ban})
        return options

    def sampler(
        self,
        options: SamplingOptions,
        text: Sequence[int],
        seed: int | None,
        processors: Sequence[LogitsProcessor],
    ) -> Sampler:
        """Return a sampler for what follows a text."""
        texts = options.dry_sequence_breakers if options.dry_multiplier else ()
        return Sampler(
            options, seed=seed, text=text, breakers=self._breakers(texts), processors=processors
        )

    def _tokens(self, key: Any) -> Sequence[Any]:
        return self._tokenizer.encode(key, False, True) if isinstance(key, str) else [key]

    def _breakers(self, texts: Sequence[str]) -> Breakers:
        """The tokens of sequence breakers; looking through a vocabulary takes a while (0.3 s)."""
        texts = tuple(texts)
        if not texts:
            return {}
        if texts not in self._known_breakers:
            from .dry import find_breakers

            pieces = [self._tokenizer.token_bytes(i) for i in range(self._tokenizer.n_vocab)]
            self._known_breakers[texts] = find_breakers(
                texts, pieces, lambda text: self._tokenizer.encode(text, False)
            )
        return self._known_breakers[texts]
