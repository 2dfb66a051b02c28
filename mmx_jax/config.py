"""Configuration: frozen dataclasses, checked when built.

Dtypes, attention kinds and implementations are strings, so that this module imports neither jax nor
flax and a config file costs nothing to load. `mmx_jax.config_io` reads, overrides and writes these.
"""

import dataclasses
import math

from mmx_jax.config_base import ConfigError, Section, added

LAYER_KINDS = ("lightning", "softmax")
BRANCHES = (*LAYER_KINDS, "mlp")  # of a layer, each with its residual
FLOAT_DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots", "attention_out")
CAPACITY_SCOPES = ("global", "local")
AUX_LOSS_FORMS = ("switch", "report")
AUX_LOSS_POOLING = ("pooled", "per_layer")
LR_SHAPES = ("constant", "linear", "exponential", "cosine")
ON_BAD_ROW = ("error", "skip")
SOURCE_FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord", "tokens")
SEQUENCE_METHODS = ("gather", "ring")
PRNG_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


# The largest size of a dimension, which indices of 32 bits reach, and the smallest positive number of float32.
_MAX_SIZE = 2**31 - 1
_FLOAT32_TINY = 2.0**-126
_MAX_LAYERS = 100_000  # the kinds of all layers are listed one by one
_DEFAULT_TOTAL_TOKENS = 1_000_000


def _require(ok: bool, message: str):
    if not ok:
        raise ConfigError(message)


def _require_positive(config, *names: str):
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{name}={value!r} must be positive")
        _require(value >= _FLOAT32_TINY, f"{name}={value!r} is zero in float32, the smallest is {_FLOAT32_TINY:.2e}")


def _require_not_negative(config, *names: str):
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{name}={value!r} must not be negative")


def _require_sizes(config, *names: str):
    """Of dimensions of arrays."""
    _require_positive(config, *names)
    for name in names:
        value = getattr(config, name)
        _require(value <= _MAX_SIZE, f"{name}={value!r} is larger than any array, at most {_MAX_SIZE:,}")


def _require_choice(config, **choices: tuple[str, ...]):
    for name, allowed in choices.items():
        value = getattr(config, name)
        _require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives `kinds`; `kinds` itself where there is none."""
    for period in range(1, len(kinds) + 1):
        if len(kinds) % period == 0 and kinds == kinds[:period] * (len(kinds) // period):
            return kinds[:period]
    raise ConfigError("layer_pattern is empty: name at least one layer kind")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shapes and constants of one decoder. The defaults are those of MiniMax-Text-01.

    `layer_pattern` is repeated `num_layers / len(layer_pattern)` times; every repetition is one hybrid
    block, and the blocks are scanned. An aperiodic stack is one block of its own length.
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    num_layers: int = 80
    layer_pattern: tuple[str, ...] = ("lightning",) * 7 + ("softmax",)
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64  # the first `rotary_dim` of `head_dim` dims rotate, in softmax layers only
    rope_theta: float = 1e7
    max_position_embeddings: int = 10_240_000

    mlp_dim: int = 9216  # of one expert
    num_experts: int = 32  # 1 is a dense SwiGLU layer
    experts_per_token: int = 2
    capacity_factor: float | None = None  # None: dropless; else tokens over the capacity are dropped
    # Of a mesh of several devices:
    capacity_scope: str = "global"  # "local": every device drops what its own tokens have too many of
    expert_buffer: float | None = None  # rows a device takes at once, times the even share; None: all that may come
    token_groups: int = 1  # parts of the tokens that travel to experts one by one, each while another is multiplied
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    postnorm: bool = True  # DeepNorm: the residual is the normed input; False is classic pre-norm
    lightning_alpha: float | None = None  # None: (2 num_layers)^(1/4) of DeepNorm with postnorm, else 1
    lightning_beta: float = 1.0
    softmax_alpha: float | None = None
    softmax_beta: float = 1.0
    mlp_alpha: float | None = None
    mlp_beta: float = 1.0
    rms_norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6  # the output norm of lightning attention has its own

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02  # carried for the Hugging Face config; see `initializer`
    initializer: str = "deepnorm_xavier"  # Xavier, with the DeepNorm gain (8 N)^-1/4 on v, o and the MLP

    dtype: str = "bfloat16"  # activations and matmul inputs; float32 asks for full float32 products
    param_dtype: str = "float32"  # the router is float32 whatever this says
    scan_blocks: bool = True
    remat: str = "none"
    lightning_implementation: str = "auto"
    lightning_chunk: int | None = None  # None: chosen from shape and device, see pallas_kernels/block_sizes.py
    softmax_implementation: str = "auto"
    softmax_block: int = 512
    moe_implementation: str = "auto"
    # What moves where mesh.seq divides the tokens of a row. Lightning: the states of all devices at once (LASP+), or
    # from neighbour to neighbour (LASP). Softmax: keys and values round a ring, or those of all devices at once.
    sequence_lightning: str = "gather"
    sequence_softmax: str = "ring"

    def check(self):
        _require_sizes(
            self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim",
            "num_experts", "experts_per_token", "max_position_embeddings", "softmax_block", "token_groups",
        )  # fmt: skip
        _require_positive(self, "rope_theta", "rms_norm_eps", "lightning_norm_eps")
        _require_not_negative(self, "router_aux_loss_coef", "initializer_range")
        _require(self.num_layers <= _MAX_LAYERS, f"num_layers={self.num_layers} is more than {_MAX_LAYERS:,}")
        _require(
            self.lightning_chunk is None or 0 < self.lightning_chunk <= _MAX_SIZE,
            f"lightning_chunk={self.lightning_chunk} must be positive, or None for one chosen from shape and device",
        )
        _require(bool(self.layer_pattern), "layer_pattern is empty: name at least one layer kind")
        for kind in self.layer_pattern:
            _require(kind in LAYER_KINDS, f"layer_pattern holds {kind!r}; the kinds are {', '.join(LAYER_KINDS)}")
        period = len(self.layer_pattern)
        below = self.num_layers // period * period
        possible = f"{below} and {below + period} are" if below else f"{period} is"
        _require(
            self.num_layers % period == 0,
            f"num_layers={self.num_layers} is not a multiple of the {period} layers of layer_pattern, {possible}; "
            "give the whole stack as the pattern if it has no period",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(
            0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}",
        )
        _require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}",
        )
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"capacity_factor={self.capacity_factor} must be positive, or None for dropless routing",
        )
        _require(
            self.expert_buffer is None or self.expert_buffer > 0,
            f"expert_buffer={self.expert_buffer} must be positive, or None for room for all rows",
        )
        _require(
            self.router_jitter_noise == 0,
            f"router_jitter_noise={self.router_jitter_noise} is not supported; the released models use 0",
        )
        _require_choice(
            self, dtype=FLOAT_DTYPES, param_dtype=FLOAT_DTYPES, remat=REMAT_POLICIES,
            initializer=("deepnorm_xavier", "normal"), sequence_lightning=SEQUENCE_METHODS,
            sequence_softmax=SEQUENCE_METHODS, capacity_scope=CAPACITY_SCOPES,
        )  # fmt: skip

    @property
    def num_blocks(self) -> int:
        return self.num_layers // len(self.layer_pattern)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by absolute index."""
        return self.layer_pattern * self.num_blocks

    def residual_scales(self, branch: str) -> tuple[float, float]:
        """(alpha, beta) of a residual; branch: a layer kind, for that of its attention, or "mlp".

        alpha scales what is kept, beta what is added. An alpha of None follows from the depth.
        """
        alpha, beta = getattr(self, f"{branch}_alpha"), getattr(self, f"{branch}_beta")
        if alpha is None:
            alpha = deepnorm_alpha(self.num_layers) if self.postnorm else 1.0
        return alpha, beta

    def resolved(self) -> "ModelConfig":
        """The same model with every alpha given: two configs that mean the same are then equal."""
        alphas = {f"{branch}_alpha": self.residual_scales(branch)[0] for branch in BRANCHES}
        return dataclasses.replace(self, **alphas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left.

    The dense part and the experts lay themselves out apart over the same devices: what `expert` and `expert_tensor`
    divide for experts is more data parallelism for the dense part, and what `tensor` divides for the dense part holds
    different experts.
    """

    data: int = -1  # copies
    fsdp: int = 1  # parameters and optimizer state in slices, gathered where they are used
    expert: int = 1  # different experts
    expert_tensor: int = 1  # slices of the width of each expert
    tensor: int = 1  # heads and vocabulary; different experts
    seq: int = 1  # tokens of a row

    def check(self):
        sizes = dataclasses.astuple(self)
        _require(
            all(size == -1 or 0 < size <= _MAX_SIZE for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes {dataclasses.asdict(self)} must be positive, at most one of them -1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(Section):
    """One source of documents: a file, or a folder searched for files of its format."""

    path: str
    format: str = "auto"
    weight: float = 1.0
    text_field: str = "text"  # of jsonl, Parquet and ArrayRecord rows
    tokens_field: str = "tokens"  # of pre-tokenised rows

    def check(self):
        _require(bool(self.path), "path of a data source is empty")
        _require_choice(self, format=SOURCE_FORMATS)
        _require_positive(self, "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is read and how it is packed. With no source, the standard library's own `.py` files."""

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""  # folder or tokenizer.json; empty: train a byte-level BPE on the sources
    tokenizer_vocab_size: int = 0  # of a trained tokenizer; 0: the model's vocab_size
    shards: int = 8  # parts of the data, each packed on its own; a process reads some of them, see BUILD.md
    eval_fraction: float = 0.02  # of the documents, chosen by a hash of their content
    packing_bins: int = 32  # rows kept open by first-fit packing
    packing_alignment: int = 1  # documents start at multiples of this (the lightning chunk, for aligned kernels)
    shuffle_buffer: int = 0  # 0: a global shuffle by index, every epoch anew
    prefetch: int = 2
    seed: int = 0
    on_bad_row: str = added("error")  # or "skip": rows that cannot be read are left out and counted
    cache_dir: str = added("")  # of decompressed copies of compressed JSON lines; empty: ~/.cache/mmx_jax/decompressed

    def check(self):
        _require_choice(self, on_bad_row=ON_BAD_ROW)
        _require(0 <= self.eval_fraction < 1, f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        _require_sizes(self, "shards", "packing_bins", "packing_alignment")
        _require_not_negative(self, "tokenizer_vocab_size", "shuffle_buffer", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRatePhase(Section):
    """One piece of the schedule, from `start` to `end`, both times the peak rate.

    Its length is `share` of the tokens of the run, or `tokens`. The last phase may have neither: it is then what is
    left of the run.
    """

    shape: str = "constant"
    tokens: int = 0
    share: float = added(0.0)
    start: float = 1.0
    end: float = 1.0

    @property
    def is_rest(self) -> bool:
        """Whether the phase takes what the others leave of the run."""
        return not (self.tokens or self.share)

    def check(self):
        _require_choice(self, shape=LR_SHAPES)
        _require_not_negative(self, "tokens", "start", "end")
        _require(0 <= self.share <= 1, f"share={self.share} of a learning-rate phase must lie in [0, 1]")
        _require(
            not (self.tokens and self.share),
            f"a learning-rate phase has tokens={self.tokens} and share={self.share}: give one of them",
        )
        _require(self.shape != "constant" or self.start == self.end, "a constant phase needs start == end")
        _require(
            self.shape != "exponential" or (self.start > 0 and self.end > 0),
            "an exponential phase needs start > 0 and end > 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRampStep(Section):
    """From `from_tokens` seen tokens on, one optimizer step takes `batch_tokens` tokens."""

    from_tokens: int
    batch_tokens: int

    def check(self):
        _require_not_negative(self, "from_tokens")
        _require_positive(self, "batch_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One stage of training: its length, sequence length, RoPE base and mixture (Table 6 of the report)."""

    tokens: int
    sequence_length: int
    rope_theta: float | None = None  # None: the model's
    source_weights: tuple[float, ...] = ()  # one for each data source; empty: their own

    def check(self):
        _require_positive(self, "tokens")
        _require_sizes(self, "sequence_length")
        _require(self.rope_theta is None or self.rope_theta > 0, f"rope_theta={self.rope_theta} must be positive")
        _require(
            all(weight > 0 for weight in self.source_weights), f"source_weights={self.source_weights} must be positive"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The recipe. Lengths of schedules are tokens, as in section 4.1 of the report, or shares of the run."""

    total_tokens: int = _DEFAULT_TOTAL_TOKENS
    sequence_length: int = 8192
    batch_tokens: int = 131072  # of one optimizer step: sequence_length x rows x accumulation
    microbatch_rows: int = 0  # rows of one forward and backward pass; 0: the whole batch at once
    batch_ramp: tuple[BatchRampStep, ...] = ()
    stages: tuple[StageConfig, ...] = ()  # empty: one stage of total_tokens at sequence_length

    learning_rate: float = 2e-4  # the peak, which the phases scale
    learning_rate_phases: tuple[LearningRatePhase, ...] = (LearningRatePhase(),)
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0  # global norm; 0: none

    z_loss_coef: float = 0.0
    aux_loss_form: str = "switch"  # "switch": E sum f P; "report": (1/E) sum f P
    aux_loss_pooling: str = "pooled"  # "pooled": f and P are means over layers (spec C.8); "per_layer": mean of losses
    loss_chunk: int = 1024  # tokens whose logits a device holds at one time
    max_nonfinite_steps: int = 0  # steps in a row with a non-finite loss or gradient that are skipped before stopping

    eval_every_steps: int = 0  # 0: only at the end
    eval_batches: int = 8
    log_every_steps: int = 1
    seed: int = 0
    prng_implementation: str = "unsafe_rbg"

    def check(self):
        _require_positive(self, "total_tokens", "batch_tokens", "learning_rate", "adam_eps", "log_every_steps")
        _require_sizes(self, "sequence_length", "loss_chunk", "eval_batches")
        _require_not_negative(
            self, "microbatch_rows", "weight_decay", "gradient_clip", "z_loss_coef", "max_nonfinite_steps",
            "eval_every_steps",
        )  # fmt: skip
        _require(
            0 <= self.adam_b1 < 1 and 0 <= self.adam_b2 < 1, f"{self.adam_b1=}, {self.adam_b2=} must lie in [0, 1)"
        )
        _require_choice(
            self,
            aux_loss_form=AUX_LOSS_FORMS,
            aux_loss_pooling=AUX_LOSS_POOLING,
            prng_implementation=PRNG_IMPLEMENTATIONS,
        )
        starts = [step.from_tokens for step in self.batch_ramp]
        _require(starts == sorted(set(starts)), f"from_tokens of batch_ramp must grow, got {starts}")
        _require(bool(self.learning_rate_phases), "learning_rate_phases is empty")
        for phase in self.learning_rate_phases[:-1]:
            _require(
                not phase.is_rest,
                "only the last of learning_rate_phases may have neither tokens nor share (it runs to the end)",
            )
        self._check_batches()

    def _check_batches(self):
        for stage in self.resolved_stages:
            for batch_tokens in [self.batch_tokens] + [step.batch_tokens for step in self.batch_ramp]:
                _require(
                    batch_tokens % stage.sequence_length == 0,
                    f"batch_tokens={batch_tokens} is not a multiple of sequence_length={stage.sequence_length}",
                )
                rows = batch_tokens // stage.sequence_length
                _require(
                    rows % (self.microbatch_rows or rows) == 0,
                    f"the {rows} rows of a batch of {batch_tokens} tokens are not a multiple of "
                    f"microbatch_rows={self.microbatch_rows}",
                )

    def check_schedule(self):
        """Raises ConfigError where the phases of the learning rate do not end with the run.

        Such a run would end at a rate that nobody chose. This is no part of `check`: what earlier versions wrote in
        config.json can still be read.
        """
        _require(
            self.total_tokens in (self.run_tokens, _DEFAULT_TOTAL_TOKENS),
            f"total_tokens={self.total_tokens:,}, and the stages have {self.run_tokens:,} tokens: change the tokens of "
            "the stages, or leave the stages out",
        )
        remedy = "give lengths as shares of the run, or no length to the last phase, which then is the rest of the run"
        taken, run = self.phase_ends[-1], self.run_tokens
        if self.learning_rate_phases[-1].is_rest:
            taken = (0, *self.phase_ends)[-2]
            _require(
                taken < run,
                f"learning_rate_phases take {taken:,} tokens before the last one, and the run has {run:,}: {remedy}",
            )
            return
        _require(taken <= run, f"learning_rate_phases take {taken:,} tokens, and the run has {run:,}: {remedy}")
        _require(
            taken == run,
            f"learning_rate_phases end after {taken:,} of the {run:,} tokens of the run: {remedy}; or add a constant "
            "phase without a length",
        )

    @property
    def resolved_stages(self) -> tuple[StageConfig, ...]:
        return self.stages or (StageConfig(tokens=self.total_tokens, sequence_length=self.sequence_length),)

    @property
    def run_tokens(self) -> int:
        """Length of the run: the sum of its stages."""
        return sum(stage.tokens for stage in self.resolved_stages)

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Tokens seen at the end of each of `learning_rate_phases`."""
        tokens, share, ends = 0, 0.0, []
        for phase in self.learning_rate_phases:
            tokens, share = tokens + phase.tokens, share + phase.share
            ends.append(tokens + round(share * self.run_tokens))
        rounding = 1e-9 * self.run_tokens if share else 0  # shares such as 0.1 + 0.2 + 0.7 are not quite 1
        if phase.is_rest or abs(ends[-1] - self.run_tokens) <= rounding:
            ends[-1] = self.run_tokens
        return tuple(ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When training saves and what it keeps."""

    save_every_steps: int = 1000
    keep: int = 3  # the newest ones
    keep_best: bool = True  # and the one with the lowest evaluation loss
    asynchronous: bool = True

    def check(self):
        _require_positive(self, "save_every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything a run is made of."""

    name: str = "minimax_text_01"
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self):
        for stage in self.training.resolved_stages:
            _require(
                not stage.source_weights or len(stage.source_weights) == max(1, len(self.data.sources)),
                f"source_weights of a stage has {len(stage.source_weights)} entries for "
                f"{max(1, len(self.data.sources))} data sources",
            )
            _require(
                self.mesh.seq == -1 or stage.sequence_length % self.mesh.seq == 0,
                f"training.sequence_length={stage.sequence_length} does not divide over mesh.seq={self.mesh.seq} "
                "devices; make it a multiple",
            )
            _require(
                stage.sequence_length <= self.model.max_position_embeddings,
                f"sequence_length={stage.sequence_length} exceeds max_position_embeddings="
                f"{self.model.max_position_embeddings}",
            )

    def in_stage(self, index: int) -> "Config":
        """With the model as stage `index` of the run trains it: the RoPE base of a stage replaces the model's."""
        base = self.training.resolved_stages[index].rope_theta
        if base is None:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, rope_theta=base))


def deepnorm_alpha(num_layers: int) -> float:
    """Residual scale of DeepNorm, (2 N)^(1/4) (arXiv 2203.00555, Table 1; section 4.2 of the report)."""
    return math.pow(2 * num_layers, 0.25)
