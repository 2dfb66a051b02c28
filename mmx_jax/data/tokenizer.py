"""Text to tokens and back, over the `tokenizers` library."""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmx_jax.data.chat_template import TEMPLATES, ChatError, render_chat
from mmx_jax.storage import file_kinds, json_io

__all__ = ["SPECIAL_TOKENS", "TEMPLATES", "ChatError", "StreamDecoder", "Tokenizer", "TokenizerError"]

END_OF_DOCUMENT = "<end_of_document>"
END_OF_SENTENCE = "<end_of_sentence>"
# Special tokens of a tokenizer trained here, with the names of the released vocabularies.
SPECIAL_TOKENS = (END_OF_DOCUMENT, "<pad>", "<beginning_of_sentence>", END_OF_SENTENCE)
_BYTES = 256
# Far above any known one. The library counts through all ids below the largest, those that are not there in a list.
_MAX_VOCABULARY = 2**24
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_OTHER_ROLES = ("sep_token", "cls_token", "mask_token")
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or built; the message names the file or the field."""


class StreamDecoder:
    """Decodes one token after another; text appears once its UTF-8 bytes are complete."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._length = 0  # of the text that is out

    def step(self, token_id: int) -> str | None:
        """Adds a token; returns the new text, or None while a character is incomplete or nothing is to be shown."""
        self._ids.append(int(token_id))
        text = self._stream.step(self._tokenizer, int(token_id))
        self._length += len(text or "")
        return text or None

    def finish(self) -> str | None:
        """The rest, with U+FFFD for bytes that never became a character; None when there is none."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)[self._length :]
        self._length += len(text)
        return text or None


@contextlib.contextmanager
def _library(what: str) -> Iterator[None]:
    """Errors of the tokenizers library as TokenizerError: it raises bare Exceptions, and panics that are none."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{what}: {error}") from error
        raise


def _check_itself(path: pathlib.Path, is_other: Callable[[bytes], str | None] = file_kinds.recognize):
    """Raises TokenizerError where something else has the name of the file: a pointer to it, an archive, a page."""
    with open(path, "rb") as file:
        if kind := is_other(file.read(file_kinds.HEAD_BYTES)):
            raise TokenizerError(f"{path}: not the file itself, but {kind}")


def _read_json(path: pathlib.Path) -> dict:
    """The JSON object of a file, {} where there is none."""
    if not path.is_file():
        return {}
    _check_itself(path)
    try:
        return json_io.read_object(path)
    except json_io.JsonError as error:
        raise TokenizerError(str(error)) from error


def _read_chat_template(folder: pathlib.Path, config: Mapping) -> str | None:
    """The template of a tokenizer folder: a `.jinja` file wins over the config, as in transformers."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        _check_itself(file, file_kinds.pointer)  # a template may be empty, or begin as a page does
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file} is not UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates
        entries = [entry if isinstance(entry, dict) else {} for entry in template]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        if "default" not in named:
            raise TokenizerError(f"chat_template of {folder} has no template named default, only {sorted(named)}")
        template = named["default"]
    if not isinstance(template, str | None):
        raise TokenizerError(f"chat_template of {folder} is a JSON {type(template).__name__}, not text")
    return template


def _content(token: Any, where: str) -> str:
    """The text of a token, which files write as such or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise TokenizerError(f"{where} is {ascii(token)[:80]}, neither text nor an object with its content")
    return content


def _read_roles(folder: pathlib.Path) -> dict:
    """`tokenizer_config.json`, with the roles of `special_tokens_map.json` as transformers takes them.

    The map wins over a config without `added_tokens_decoder`, as older versions wrote them, and else fills gaps.
    """
    config = _read_json(folder / "tokenizer_config.json")
    extra = _read_json(folder / "special_tokens_map.json")
    known = {key: extra[key] for key in (*_ROLES, *_OTHER_ROLES, *_TOKEN_LISTS) if extra.get(key) is not None}
    return known | config if "added_tokens_decoder" in config else config | known


def _declare_tokens(backend: tokenizers.Tokenizer, folder: pathlib.Path, config: Mapping):
    """Makes special what any of the files declares so; adds tokens that `tokenizer.json` lacks, at their ids."""
    declared: dict[str, tuple[int | None, tokenizers.AddedToken]] = {}
    for token, token_id in sorted(_read_json(folder / "added_tokens.json").items(), key=lambda item: str(item[1])):
        declared[token] = _as_id(token_id, folder / "added_tokens.json"), tokenizers.AddedToken(token, normalized=False)
    decoder = config.get("added_tokens_decoder") or {}
    where = folder / "tokenizer_config.json"
    if not isinstance(decoder, Mapping):
        raise TokenizerError(f"added_tokens_decoder of {where} is a JSON {type(decoder).__name__}, not an object")
    for token_id, token in decoder.items():
        content = _content(token, f"token {ascii(token_id)} of added_tokens_decoder of {where}")
        declared[content] = _as_id(token_id, where), _added_token(content, token)
    for content, token in _special_tokens(config, where):
        token_id, known = declared.get(content, (None, None))
        token = known or _added_token(content, token if isinstance(token, Mapping) else {})
        token.special = True
        declared[content] = token_id, token
    roles = {_content(config[role], role) for role in (*_ROLES, *_OTHER_ROLES) if config.get(role) is not None}
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for content, (token_id, token) in sorted(declared.items(), key=_id_first):
        found = backend.token_to_id(content)
        if found is None and token_id is None and content in roles:
            continue  # `Tokenizer` says so, of the roles that it reads
        if found is None or (token.special and content not in special):
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            found = backend.token_to_id(content)
        if token_id is not None and found != token_id:
            raise TokenizerError(
                f"the files of {folder} declare token {ascii(content)} as {token_id}, but with tokenizer.json it is "
                f"{found}"
            )


def _id_first(declared: tuple[str, tuple[int | None, Any]]) -> tuple[bool, int]:
    """Sorts declared tokens by their ids, those without one to the end, as transformers adds them."""
    token_id = declared[1][0]
    return token_id is None, token_id or 0


def _special_tokens(config: Mapping, where: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(text, token as written) of everything that the config calls special."""
    for role in (*_ROLES, *_OTHER_ROLES):
        if (token := config.get(role)) is not None:
            yield _content(token, f"{role} of {where}"), token
    for key in _TOKEN_LISTS:
        tokens = config.get(key) or []
        tokens = list(tokens.values()) if isinstance(tokens, Mapping) else tokens
        if not isinstance(tokens, list):
            raise TokenizerError(f"{key} of {where} is a JSON {type(tokens).__name__}, not a list")
        for token in tokens:
            yield _content(token, f"an entry of {key} of {where}"), token


def _added_token(content: str, token: Mapping) -> tokenizers.AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(content, **({"normalized": False} | {f: bool(token[f]) for f in flags if f in token}))


def _as_id(token_id: Any, where: pathlib.Path) -> int:
    text = str(token_id)
    if isinstance(token_id, bool) or not (text.isascii() and text.isdigit() and len(text) < 10):
        raise TokenizerError(f"{where} gives a token the id {ascii(token_id)[:40]}, which is none")
    return int(text)


class Tokenizer:
    """A `tokenizers` tokenizer with the roles of its special tokens and its chat template.

    Args:
      backend: the tokenizer proper.
      config: what `tokenizer_config.json` holds; `eos_token`, `bos_token`, `pad_token` and `unk_token` are read.
      chat_template: Jinja source, or None.

    Raises:
      TokenizerError: a role names a token that the vocabulary lacks.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping | None = None, chat_template: str | None = None):
        self.backend = backend
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.special_tokens = {  # role -> token
            role: _content(token, f"{role} of tokenizer_config.json")
            for role in _ROLES
            if (token := self.config.get(role)) is not None
        }
        # A stored truncation or padding is for the model that it was trained for: it must not cut documents here.
        self._stored = backend.truncation, backend.padding
        backend.no_truncation()
        backend.no_padding()
        if not backend.get_vocab_size(with_added_tokens=True):
            raise TokenizerError("the vocabulary is empty")
        if self.vocab_size > _MAX_VOCABULARY:
            raise TokenizerError(
                f"the vocabulary holds token {self.vocab_size - 1}; no vocabulary goes beyond {_MAX_VOCABULARY - 1}"
            )
        self.bos_id, self.eos_id, self.pad_id = map(self._role_id, ("bos_token", "eos_token", "pad_token"))

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        if token is None:
            return None
        if (token_id := self.backend.token_to_id(token)) is None:
            raise TokenizerError(f"{role}={token!r} of tokenizer_config.json is not in the vocabulary")
        return token_id

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a folder with `tokenizer.json`, or such a file; `tokenizer_config.json` beside it is optional.

        Raises:
          FileNotFoundError: there is no `tokenizer.json`.
          TokenizerError: a file that cannot be understood.
        """
        path = pathlib.Path(os.path.expanduser(path))
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: give a tokenizer.json or a folder that holds one")
        _check_itself(file)
        with _library(f"{file} is not a tokenizer of the tokenizers library"):
            backend = tokenizers.Tokenizer.from_file(str(file))
        config = _read_roles(file.parent)
        with _library(f"the tokens of {file} and the files beside it do not fit together"):
            _declare_tokens(backend, file.parent, config)
        try:
            return cls(backend, config, _read_chat_template(file.parent, config))
        except TokenizerError as error:
            raise error if str(file.parent) in str(error) else TokenizerError(f"{file}: {error}") from error

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> "Tokenizer":
        """Trains a byte-level BPE; the same texts give the same tokenizer.

        Args:
          texts: what to learn from; short texts give fewer than `vocab_size` tokens.
          vocab_size: most tokens, special ones included.
          special_tokens: take the first ids. `<end_of_document>` is the eos, and `<pad>` the padding.
        """
        smallest = _BYTES + len(special_tokens)
        if vocab_size < smallest:
            raise TokenizerError(f"{vocab_size=} is below {smallest}: every byte and special token needs an id")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train_from_iterator(texts, trainer)
        roles = {"eos_token": END_OF_DOCUMENT, "pad_token": "<pad>"}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend, config | {role: token for role, token in roles.items() if token in special_tokens})

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, the chat template within."""
        folder = pathlib.Path(os.path.expanduser(folder))
        folder.mkdir(parents=True, exist_ok=True)
        backend, (truncation, padding) = self.backend, self._stored
        if truncation or padding:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            if truncation:
                backend.enable_truncation(**truncation)
            if padding:
                backend.enable_padding(**padding)
        backend.save(str(folder / "tokenizer.json"))
        config = self.config if self.chat_template is None else self.config | {"chat_template": self.chat_template}
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: rows that an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: eos, and the end of a chat turn where the vocabulary has it."""
        ids = {self.eos_id, self.token_to_id(END_OF_SENTENCE)}
        return tuple(sorted(token for token in ids if token is not None))

    @functools.cached_property
    def shown_as_nothing(self) -> dict[int, str]:
        """Special tokens, id -> text, which `decode` leaves out."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which the text of a special token is text like any other."""
        with _library("the tokenizer, written out, cannot be read again"):
            backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Tokens of a text; neither bos nor eos is added.

        Args:
          text: any text.
          parse_special: read `<end_of_sentence>` and its like as special tokens, as prompts need. Documents to
            learn from are data and pass False.
        """
        backend = self.backend if parse_special else self._plain_backend
        with _library("the tokenizer cannot encode a text"):
            return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; bytes that form no character become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """An incremental decoder; what it gives out, joined, equals `decode` of all its tokens."""
        return StreamDecoder(self.backend, skip_special_tokens)

    def apply_chat(
        self,
        messages: Sequence[Mapping],
        template: str | None = None,
        *,
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation, see `mmx_jax.data.chat_template.render_chat`.

        Args:
          template: a key of `TEMPLATES` or Jinja source; None takes the tokenizer's own.

        Raises:
          ChatError: the tokenizer has no template and none is given; messages that do not fit the template.
        """
        template = template or self.chat_template
        if template is None:
            raise ChatError(
                f"this tokenizer has no chat template: name one with template=, or --template of infer.py: "
                f"{', '.join(TEMPLATES)}"
            )
        return render_chat(
            messages, template, tools=tools, add_generation_prompt=add_generation_prompt, **self.special_tokens
        )
