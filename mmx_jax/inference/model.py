"""The Python interface: a model with its tokenizer, to evaluate, to generate from, to export."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mmx_jax.checkpoints import generation_config, hf_config, load
from mmx_jax.config import FLOAT_DTYPES, ModelConfig, RuntimeConfig
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.inference import complete as text_completion
from mmx_jax.inference import generate, inputs
from mmx_jax.inference.generate import PREFILL_CHUNK
from mmx_jax.inference.inputs import GenerationError, TokenRows
from mmx_jax.inference.sampling import SamplingParams
from mmx_jax.inference.session import Session, SessionSettings
from mmx_jax.models.decoder import Decoder


def from_pretrained(
    path: str | os.PathLike,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    runtime: RuntimeConfig = RuntimeConfig(),
) -> "Model":
    """Loads a model.

    Args:
      path: a Hugging Face folder (released layout or a transformers save), a converted checkpoint, a training run
        (its newest step) or one of its steps.
      dtype: of the weights and the computation. "float32" gives the exact function; with "bfloat16" router,
        lightning states, decays and logits are still float32.
      mesh: of `mmx_jax.sharding.make_mesh`; None: one device.
      runtime: kernels and block sizes.

    Raises:
      ValueError: an unknown dtype; a path that is no checkpoint, or a damaged one (`ConversionError`).
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    source = load.resolve(path)
    eos_ids = generation_config.eos_ids(source.config, source.folder)
    config, params = load.load_params(path, param_dtype=dtype, mesh=mesh)
    config = generate.inference_config(config, dtype)
    has_tokenizer = source.tokenizer_dir is not None and (source.tokenizer_dir / "tokenizer.json").is_file()
    tokenizer_dir = source.tokenizer_dir if has_tokenizer else None
    return Model(config, params, tokenizer_dir, mesh, eos_ids=eos_ids, runtime=runtime)


class Model:
    """A model in memory.

    Args:
      config: its dtype is that of the computation.
      params: the parameter tree.
      tokenizer_dir: folder with tokenizer.json, or None.
      mesh: where `params` lie; None: one device.
      eos_ids: tokens that end a text, besides those of the config and the tokenizer.
      runtime: kernels and block sizes.

    Attributes:
      tokenizer: `mmx_jax.data.tokenizer.Tokenizer`, or None where the checkpoint has none.

    `tokens` are integers [B, T] below; [T] is one row, B = 1 in the result. Rows of different lengths are padded at the
    left, to the longest T. `mask`, of the same shape, is 1 at tokens and 0 at padding, which may stand at either
    side or between; results are those of the rows without it. Bad tokens raise `GenerationError`, as do logits that are
    NaN or infinite: the message tells the row and whether the weights are the cause.
    """

    def __init__(
        self,
        config: ModelConfig,
        params,
        tokenizer_dir=None,
        mesh: jax.sharding.Mesh | None = None,
        *,
        eos_ids: Sequence[int] = (),
        runtime: RuntimeConfig = RuntimeConfig(),
    ):
        self.config, self.params, self.mesh = config, params, mesh
        self.decoder = Decoder(config, dataclasses.replace(runtime, remat="none"))
        self._tokenizer_dir = tokenizer_dir
        self.tokenizer = None if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)
        own = () if config.eos_token_id is None else (config.eos_token_id,)
        self._eos_ids = {*own, *eos_ids}

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        devices = sorted({str(device) for leaf in leaves[:1] for device in leaf.devices()}) if leaves else []
        place = f"{len(devices)} devices" if len(devices) > 1 else "".join(devices)
        tokenizer = "no tokenizer" if self.tokenizer is None else f"tokenizer of {self.tokenizer.vocab_size:,} tokens"
        layers = hf_config.describe(self.config)
        return f"Model({layers}, {count:,} parameters, {self.config.dtype} on {place}, {tokenizer})"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: all that the config, generation_config.json and the tokenizer name."""
        return tuple(sorted({*self._eos_ids, *(() if self.tokenizer is None else self.tokenizer.stop_ids)}))

    @property
    def pad_id(self) -> int:
        """The token that `generate` puts after a stop token."""
        return self.config.pad_token_id or 0

    def logits(self, tokens: TokenRows, mask: TokenRows | None = None) -> np.ndarray:
        """float32 logits [B, T, V]; those at padding mean nothing."""
        tokens, mask = inputs.check_tokens(self.config, tokens, mask)
        length = tokens.shape[1]
        right = ((0, 0), (0, generate.slot_bucket(length) - length))
        mask = np.pad(mask, right)
        segment_ids = None if mask.all() else mask.astype(np.int32)
        with generate.on_mesh(self.mesh):
            logits, finite = generate.forward(self.decoder, self.params, np.pad(tokens, right), segment_ids)
            if (wrong := np.argwhere(mask & ~np.asarray(finite))).size:
                row, column = wrong[0]
                raise generate.not_finite_error(self.config, self.params, f"row {row}, column {column}")
        return np.asarray(logits)[:, :length]

    def score(
        self, tokens: TokenRows, mask: TokenRows | None = None, *, prefill_chunk: int = PREFILL_CHUNK
    ) -> np.ndarray:
        """Log-probabilities (nats) float32 [B, T] of each token given those before it in its row.

        The first token of a row, which nothing precedes, and padding have 0. Long rows run in chunks of
        `prefill_chunk` tokens that carry the state, so that [T, V] logits never exist.
        """
        tokens, mask = inputs.check_tokens(self.config, tokens, mask)
        limit = self.config.max_position_embeddings
        if (longest := int(mask.sum(axis=1).max())) > limit:
            raise GenerationError(f"{longest} tokens exceed max_position_embeddings={limit} of the model; cut the text")
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk={prefill_chunk} must be positive")
        with generate.on_mesh(self.mesh):
            return generate.score(self.decoder, self.params, tokens, mask, chunk=prefill_chunk)

    def session(
        self,
        batch: int,
        *,
        seed: int | Sequence[int] = 0,
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        **sampling,
    ) -> Session:
        """`batch` sequences to read and write turn by turn; see `mmx_jax.inference.session.Session`.

        Args:
          seed, stop_tokens, prefill_chunk: as in `generate`.
          sampling: fields of `mmx_jax.inference.sampling.SamplingParams`: temperature, top_k, top_p, min_p,
            repetition_penalty.
        """
        settings = SessionSettings(
            sampling_params=SamplingParams(**sampling),
            seed=seed,
            stop_tokens=stop_tokens,
            vocab_size=None if self.tokenizer is None else self.tokenizer.vocab_size,
            prefill_chunk=prefill_chunk,
        )
        return Session(self.decoder, self.params, batch, settings, mesh=self.mesh)

    def stream(
        self, tokens: TokenRows, mask: TokenRows | None = None, max_new_tokens: int = 16, **settings
    ) -> Iterator[np.ndarray]:
        """As `generate`, in pieces int32 [B, n] as they are made: the first token alone, then up to 8; it ends early
        when all rows have."""
        tokens, mask = inputs.check_tokens(self.config, tokens, mask)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={max_new_tokens} must be positive")
        session = self.session(len(tokens), **settings)
        session.extend(tokens, mask, reserve=max_new_tokens)
        return (np.where(piece < 0, self.pad_id, piece) for piece in session.stream(max_new_tokens))

    def generate(
        self, tokens: TokenRows, mask: TokenRows | None = None, max_new_tokens: int = 16, **settings
    ) -> np.ndarray:
        """Continues every row.

        Args:
          settings: of `session`, of which

            - temperature (0 is greedy, the default), top_k, top_p, min_p and repetition_penalty are those of
              `mmx_jax.inference.sampling.SamplingParams`;
            - seed: row b draws with seed + b, or with its own if there is one for each row; the other rows of a batch
              and the padding do not matter to it;
            - stop_tokens: a row ends with one of these, which is its last token. The model's eos is not implied;
            - prefill_chunk: prompts longer than this are read in pieces.

        Returns:
          int32 [B, max_new_tokens]; `pad_id` (the config's `pad_token_id`, else 0) after a row's stop token.

        Raises:
          SamplingError: a setting outside its range.
          GenerationError: prompt and continuation exceed `max_position_embeddings`; a row without a token; logits
            that are NaN or infinite.
        """
        tokens, mask = inputs.check_tokens(self.config, tokens, mask)
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens={max_new_tokens} must be positive")
        session = self.session(len(tokens), **settings)
        session.extend(tokens, mask, reserve=max_new_tokens)
        result = np.full((len(tokens), max_new_tokens), self.pad_id, np.int32)
        at = 0
        for piece in session.stream(max_new_tokens, steps=generate.DECODE_STEPS):
            result[:, at : at + piece.shape[1]] = np.where(piece < 0, self.pad_id, piece)
            at += piece.shape[1]
        return result

    def complete(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        **settings,
    ) -> str | list[str]:
        """Continues text; a text ends at `stop_ids` of the model, too.

        Args:
          prompts: one text, or several that run as one batch.
          stop: texts that end a continuation and are no part of it.
          stop_tokens: more tokens that do.
          settings: of `session`, such as temperature, top_p and seed; greedy without.

        Returns:
          The continuation without the prompt, or a list of them.

        Raises:
          SamplingError, GenerationError: as `generate`; a prompt that is no text; the model has no tokenizer.
        """
        single = isinstance(prompts, str)
        prompts = [prompts] if single else list(prompts)
        texts = [""] * len(prompts)
        if prompts:
            for row, text in text_completion.complete(
                self,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_tokens={*self.stop_ids, *stop_tokens},
                stop_strings=stop,
                **settings,
            ):
                texts[row] += text
        return texts[0] if single else texts

    def export(self, path: str | os.PathLike, naming: str = "original") -> str:
        """Writes a Hugging Face folder of safetensors in the model's dtype, routers float32, with the tokenizer.

        Args:
          path: a folder that does not exist yet.
          naming: of config.json: "original" (as released) or "transformers".

        Returns:
          A report of a few lines.

        Raises:
          ConversionError: `path` exists, or the disk is full.
        """
        return load.save_huggingface(self.params, self.config, path, naming, tokenizer_dir=self._tokenizer_dir)
