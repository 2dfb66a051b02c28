"""Text to tokens and back, over the `tokenizers` library."""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmx_jax.chat import TEMPLATES, ChatError, render_chat

__all__ = ["SPECIAL_TOKENS", "TEMPLATES", "ChatError", "StreamDecoder", "Tokenizer", "TokenizerError"]

END_OF_DOCUMENT = "<end_of_document>"
END_OF_SENTENCE = "<end_of_sentence>"
# Of a tokenizer trained here; the names are those of the released vocabularies (spec F).
SPECIAL_TOKENS = (END_OF_DOCUMENT, "<pad>", "<beginning_of_sentence>", END_OF_SENTENCE)
_BYTES = 256


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


def _read_json(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _read_chat_template(folder: pathlib.Path, config: Mapping) -> str | None:
    """The template of a tokenizer folder: a `.jinja` file wins over the config, as in transformers."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise TokenizerError(f"chat_template of {folder} has no template named default, only {sorted(named)}")
        template = named["default"]
    return template


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
            role: token["content"] if isinstance(token, Mapping) else token
            for role in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := self.config.get(role)) is not None
        }
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
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}: give a tokenizer.json or a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
        config_file = file.parent / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.is_file() else {}
        return cls(backend, config, _read_chat_template(file.parent, config))

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
            vocab_size=vocab_size, special_tokens=list(special_tokens), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
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
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
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
        ids = {self.eos_id, self.token_to_id(END_OF_SENTENCE)} - {None}
        return tuple(sorted(ids))

    @functools.cached_property
    def shown_as_nothing(self) -> dict[int, str]:
        """Special tokens, id -> text, which `decode` leaves out."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which the text of a special token is text like any other."""
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
        """The text of a conversation, see `mmx_jax.chat.render_chat`.

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
