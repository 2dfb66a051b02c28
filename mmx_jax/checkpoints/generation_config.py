"""The tokens that begin, pad and end a text: what config.json, generation_config.json and the tokenizer say of them.

transformers ends a generation at `eos_token_id` of generation_config.json and, without that file, at that of
config.json; either may be a list. Here a text ends at every token that one of the files or the tokenizer names.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mmx_jax.checkpoints import json_files
from mmx_jax.checkpoints.errors import ConversionError, shown
from mmx_jax.config import ModelConfig
from mmx_jax.data.tokenizer import Tokenizer, TokenizerError

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Special ids of a model; `eos` holds every token that ends a text, the end of a document first."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    problem: str = ""  # why the tokenizer could not be asked

    def as_json(self) -> dict[str, Any]:
        """The object of generation_config.json; `eos_token_id` is a list where there are several."""
        eos = list(self.eos) if len(self.eos) > 1 else next(iter(self.eos), None)
        ids = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}
        return {key: value for key, value in ids.items() if value is not None}


def as_ids(value: Any, name: str) -> tuple[int, ...]:
    """The ids of an `eos_token_id` entry: null, one id or a list of ids."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ConversionError(f"{name}={shown(value)} must be a token id, a list of token ids or null")
    return tuple(dict.fromkeys(ids))


def read(folder: Path | None) -> dict[str, Any]:
    """generation_config.json of a folder, {} where it has none.

    Raises:
      ConversionError: a file that is no JSON object, or whose token ids are none.
    """
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return {}
    try:
        value = json_files.read_object(path)
    except (ConversionError, OSError) as error:
        raise ConversionError(f"{error}, or remove it") from None
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = as_ids(value.get(key), f"{path}: {key}")
        if len(ids) > 1 and key != "eos_token_id":
            raise ConversionError(f"{path}: {key}={shown(value[key])} must be one token id or null")
    return value


def declared_eos(folder: Path | None) -> tuple[int, ...]:
    """Every `eos_token_id` of the folder's files: of a Hugging Face config.json, then of generation_config.json.

    Raises:
      ConversionError: a file that cannot be read, or an entry that is no id.
    """
    if folder is None:
        return ()
    path, listed = folder / "config.json", ()
    if path.is_file():
        try:
            listed = as_ids(json_files.read_object(path).get("eos_token_id"), f"{path}: eos_token_id")
        except OSError as error:
            raise ConversionError(str(error)) from None
    generation = as_ids(read(folder).get("eos_token_id"), f"{folder / FILE}: eos_token_id")
    return tuple(dict.fromkeys((*listed, *generation)))


def eos_ids(config: ModelConfig, folder: Path | None) -> tuple[int, ...]:
    """Tokens that end a text by the model's config and the files of its folder; the tokenizer is not asked.

    Raises:
      ConversionError: as `declared_eos`, or an id outside the vocabulary.
    """
    own = () if config.eos_token_id is None else (config.eos_token_id,)
    ids = tuple(dict.fromkeys((*own, *declared_eos(folder))))
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ConversionError(
                f"eos_token_id {token} of {folder or 'the config'} is outside the vocabulary, 0 to "
                f"{config.vocab_size - 1}; correct config.json or {FILE}"
            )
    return ids


def token_ids(config: ModelConfig, folder: Path | None) -> TokenIds:
    """The special tokens that an export states: the config first, then the tokenizer of `folder`, then
    generation_config.json.

    Raises:
      ConversionError: as `eos_ids`, or the tokenizer has an id outside the vocabulary.
    """
    declared, generation = eos_ids(config, folder), read(folder)
    tokenizer, problem = _tokenizer(folder)
    roles = {} if tokenizer is None else {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    end, stops = roles.get("eos"), () if tokenizer is None else tokenizer.stop_ids
    if (largest := max([-1, *stops, *(i for i in roles.values() if i is not None)])) >= config.vocab_size:
        raise ConversionError(
            f"{folder}: special token {largest} of the tokenizer is outside the model's vocabulary of "
            f"{config.vocab_size}; put the tokenizer of this model there"
        )
    first = config.eos_token_id if config.eos_token_id is not None else end
    eos = (*(() if first is None else (first,)), *declared, *stops)

    def choose(role):
        values = (getattr(config, f"{role}_token_id"), roles.get(role), generation.get(f"{role}_token_id"))
        return next((value for value in values if value is not None), None)

    return TokenIds(choose("bos"), tuple(dict.fromkeys(eos)), choose("pad"), problem)


def _tokenizer(folder: Path | None) -> tuple[Tokenizer | None, str]:
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None, ""
    try:
        return Tokenizer.load(folder), ""
    except TokenizerError as error:  # the files travel unread otherwise, so that this ends no export
        return None, str(error)
