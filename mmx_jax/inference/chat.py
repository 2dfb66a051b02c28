"""Conversations that keep their state from turn to turn."""

from collections.abc import Iterator, Sequence

from mmx_jax.data.chat_template import ChatError
from mmx_jax.inference.complete import TextModel, encode_prompts
from mmx_jax.inference.detokenize import check_stop_strings, check_text, special_stops, stream_text
from mmx_jax.inference.inputs import GenerationError
from mmx_jax.inference.session import Session
from mmx_jax.inference.speed import Speed


class Conversation:
    """A chat. The decode state stays between turns; of a new turn only the new text is read.

    The whole conversation is read again where the template writes an earlier turn otherwise than it was generated
    (reasoning that is dropped, a reply cut at a stop string).

    Args:
      model: with a tokenizer.
      template: a key of `mmx_jax.data.tokenizer.TEMPLATES`; None takes the tokenizer's own.
      system: the system message, if any.
      stop_tokens: end a reply, as the special tokens do that stop strings begin with.
      settings: of `Model.session`.

    Raises:
      ChatError: the template does not write the system message.
      GenerationError: a text or a stop string that cannot be.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        template: str | None = None,
        system: str | None = None,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (),
        **settings,
    ):
        if model.tokenizer is None:
            raise GenerationError("a conversation needs a tokenizer: put tokenizer.json beside the weights")
        self._tokenizer = model.tokenizer
        self._model, self._template, self._max_new_tokens = model, template, max_new_tokens
        self._stop_strings = check_stop_strings(stop_strings)
        self._stop_tokens = tuple(sorted({*stop_tokens, *special_stops(self._tokenizer, self._stop_strings)}))
        self._settings = settings
        self._context: str | None = None  # the text that the session has read and written; None: unknown
        self.messages: list[dict] = []
        if system is not None:
            self.messages.append({"role": "system", "content": check_text(system, "the system message")})
            self._check_system(system)
        self.session: Session | None = None
        self.speed = Speed()

    def _check_system(self, system: str):
        """Some templates of other models leave a system message out without a word."""
        rendered = self._tokenizer.apply_chat([*self.messages, {"role": "user", "content": "hi"}], self._template)
        if system.strip() not in rendered:
            raise ChatError("the chat template leaves the system message out: say it in the first turn instead")

    def reply(self, text: str) -> Iterator[str]:
        """Says `text` and yields the reply in pieces.

        Raises:
          ChatError: there is no template, or it cannot render the messages.
          GenerationError: the turn is no text, or the conversation exceeds `max_position_embeddings`; the turn is
            then taken back.
        """
        messages = [*self.messages, {"role": "user", "content": check_text(text, "the turn")}]
        prompt = self._tokenizer.apply_chat(messages, self._template)
        known, self._context = self._context, None
        if known is None or self.session is None or not prompt.startswith(known):
            known = None
            self.session = self._model.session(1, stop_tokens=self._stop_tokens, **self._settings)
        tokens, _ = encode_prompts(self._tokenizer, [prompt[len(known or "") :]])
        try:
            self.speed.extend(self.session, tokens, reserve=self._max_new_tokens)
        except GenerationError:
            self._context = known  # nothing was read
            raise
        return self._replies(self.session, messages, prompt)

    def _replies(self, session: Session, messages, prompt):
        tokenizer, written, answer = self._tokenizer, [], []

        def record(pieces):
            for piece in pieces:
                written.extend(piece[0][piece[0] >= 0].tolist())
                yield piece

        try:
            pieces = record(self.speed.watch(session.stream(self._max_new_tokens)))
            for _, text in stream_text(
                session, pieces, tokenizer, stop_tokens=self._stop_tokens, stop_strings=self._stop_strings
            ):
                answer.append(text)
                yield text
            self._context = prompt + tokenizer.decode(written, skip_special_tokens=False)
        finally:  # also when the reader loses patience; the next turn then starts from the text
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
