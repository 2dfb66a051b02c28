"""`config.json` of the released models and of transformers, to and from `ModelConfig`.

The two namings occur under one repository name, so they are told apart by their keys and by nothing else
(`attn_type_list`: as released for MiniMax-Text-01 and MiniMax-M1; `layer_types`: transformers' MiniMaxConfig).
Nothing that changes the function is ever defaulted: both libraries' own defaults build a different model
without a word (spec/text01.md, A.2).
"""

import difflib
import math
from typing import Any

from absl import logging

from mmx_jax.checkpoints import generation_config
from mmx_jax.checkpoints.errors import ConversionError, shown
from mmx_jax.config import ModelConfig, shortest_period

NAMINGS = ("original", "transformers")
MAX_HINTS = 8  # unknown keys that a message names
LAYER_KIND_KEYS = {"original": "attn_type_list", "transformers": "layer_types"}
LAYER_KIND_VALUES = {
    "original": {0: "lightning", 1: "softmax"},
    "transformers": {"linear_attention": "lightning", "full_attention": "softmax"},
}

COMMON_INTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
    "intermediate_size": "mlp_dim",
    "num_experts_per_tok": "experts_per_token",
}
COMMON_FLOATS = {
    "rms_norm_eps": "rms_norm_eps",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "initializer_range": "initializer_range",
}
RESIDUAL_SCALES = {
    "original": {
        "layernorm_linear_attention_alpha": "lightning_alpha",
        "layernorm_linear_attention_beta": "lightning_beta",
        "layernorm_full_attention_alpha": "softmax_alpha",
        "layernorm_full_attention_beta": "softmax_beta",
        "layernorm_mlp_alpha": "mlp_alpha",
        "layernorm_mlp_beta": "mlp_beta",
    },
    "transformers": {
        "linear_attn_alpha_factor": "lightning_alpha",
        "linear_attn_beta_factor": "lightning_beta",
        "full_attn_alpha_factor": "softmax_alpha",
        "full_attn_beta_factor": "softmax_beta",
        "mlp_alpha_factor": "mlp_alpha",
        "mlp_beta_factor": "mlp_beta",
    },
}
# In neither naming: this project's own key, written only where the value is not that of both codes.
LIGHTNING_NORM_EPS = "lightning_norm_eps"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the released file leaves pad out: absent means none

# Keys that select a behaviour of which only one value is built here.
ONLY_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "router_jitter_noise": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
OPTIONAL_ONLY_VALUES = {"rope_scaling": None, "quantization_config": None}

# Keys that do not change what the model computes, with PretrainedConfig's own (the VL-01 text_config spells them out).
INERT = frozenset(
    """
    architectures auto_map model_type transformers_version use_cache torch_dtype dtype output_router_logits
    _name_or_path _attn_implementation _attn_implementation_autoset shared_moe_mode block_size
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task id2label label2id tokenizer_class prefix sep_token_id
    decoder_start_token_id task_specific_params problem_type
    """.split()
)


def model_config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Builds the ModelConfig of a released or transformers `config.json`.

    Args:
      config: the parsed JSON object. The naming is detected from its keys.

    Returns:
      A ModelConfig. `lightning_norm_eps` is 1e-6, that of both codes, unless the key of this name says otherwise.

    Raises:
      ConversionError: a key is missing, unknown, or holds a value that this model does not compute.
    """
    naming = detect_naming(config)
    _check_keys(config, naming)
    _check_only_values(config)
    fields = {field: _integer(config, key) for key, field in COMMON_INTS.items()}
    for key, field in {**COMMON_FLOATS, **RESIDUAL_SCALES[naming]}.items():
        fields[field] = _number(config, key)
    fields |= {key: _token_id(config, key) for key in TOKEN_IDS}
    fields["layer_pattern"] = shortest_period(_layer_kinds(config, naming))
    fields["num_experts"] = _num_experts(config)
    fields["head_dim"] = _head_dim(config, naming)
    fields["rotary_dim"] = _rotary_dim(config, fields["head_dim"])
    fields["rope_theta"] = _rope_theta(config)
    if LIGHTNING_NORM_EPS in config:
        fields[LIGHTNING_NORM_EPS] = _number(config, LIGHTNING_NORM_EPS)
    # transformers' module always normalises the residual; the key is an extra that only other readers honour.
    fields["postnorm"] = _boolean(config, "postnorm") if "postnorm" in config else True
    return ModelConfig(**fields)


def model_config_to_hf(config: ModelConfig, naming: str) -> dict[str, Any]:
    """The `config.json` object of a model in either naming, keys sorted.

    It names the classes that MiniMax and transformers have for the naming; `model_code.choose` tells whether they are
    there and compute the model.

    Raises:
      ConversionError: `naming` is not one of NAMINGS.
    """
    if naming not in NAMINGS:
        raise ConversionError(f"naming {naming!r} is not one of {', '.join(NAMINGS)}")
    kinds = {kind: value for value, kind in LAYER_KIND_VALUES[naming].items()}
    hf = {key: getattr(config, field) for key, field in (COMMON_INTS | COMMON_FLOATS).items()}
    for key, field in RESIDUAL_SCALES[naming].items():
        branch, which = field.rsplit("_", 1)
        hf[key] = config.residual_scales(branch)[("alpha", "beta").index(which)]
    hf |= {key: getattr(config, key) for key in TOKEN_IDS}
    hf |= ONLY_VALUES | {"attention_dropout": 0.0, "router_jitter_noise": 0.0}
    hf |= {
        LAYER_KIND_KEYS[naming]: [kinds[kind] for kind in config.layer_kinds],
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "postnorm": config.postnorm,
        "rotary_dim": config.rotary_dim,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "use_cache": True,
    }
    if config.lightning_norm_eps != ModelConfig.lightning_norm_eps:
        hf[LIGHTNING_NORM_EPS] = config.lightning_norm_eps
    if naming == "original":
        hf |= {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config",
                "AutoModelForCausalLM": "modeling_minimax_text_01.MiniMaxText01ForCausalLM",
            },
            "model_type": "minimax_text_01",
            "rope_theta": config.rope_theta,
            "transformers_version": "4.45.2",
        }
    else:
        hf |= {
            "architectures": ["MiniMaxForCausalLM"],
            "block_size": 256,
            "dtype": config.param_dtype,
            "model_type": "minimax",
            "rope_parameters": {
                "partial_rotary_factor": config.rotary_dim / config.head_dim,
                "rope_theta": config.rope_theta,
                "rope_type": "default",
            },
        }
    return dict(sorted(hf.items()))


def detect_naming(config: dict[str, Any]) -> str:
    """One of NAMINGS, by the key that lists the layer kinds."""
    if not isinstance(config, dict):
        raise ConversionError(f"config.json holds a {type(config).__name__}; a JSON object is expected")
    found = [naming for naming in NAMINGS if LAYER_KIND_KEYS[naming] in config]
    if len(found) != 1:
        problem = "holds both" if found else "holds neither"
        raise ConversionError(
            f"config.json {problem} 'attn_type_list' (the released naming) {'and' if found else 'nor'} 'layer_types' "
            "(transformers' naming); exactly one of them must list the kind of every layer"
        )
    return found[0]


def _check_keys(config, naming):
    required = set(COMMON_INTS) | set(COMMON_FLOATS) | set(RESIDUAL_SCALES[naming]) | set(ONLY_VALUES)
    required |= {LAYER_KIND_KEYS[naming], "head_dim"}
    optional = set(TOKEN_IDS) | set(OPTIONAL_ONLY_VALUES) | {"num_local_experts", "num_experts", "rope_parameters"}
    optional |= {LIGHTNING_NORM_EPS}
    explicit = {"rotary_dim", "postnorm", "shared_intermediate_size", "rope_theta"}
    if naming == "original":
        required |= explicit
    else:
        optional |= explicit | {"partial_rotary_factor"}
    valid = required | optional | INERT
    unknown = sorted(set(config) - valid)
    missing = sorted(required - set(config))
    if not {"num_local_experts", "num_experts"} & set(config):
        missing.append("num_local_experts")
    if unknown:
        hints = [f"{shown(key)} (nearest valid key: {_nearest(key, valid)!r})" for key in unknown[:MAX_HINTS]]
        if len(unknown) > MAX_HINTS:
            hints.append(f"and {len(unknown) - MAX_HINTS} more")
        also = f"; missing: {', '.join(map(repr, missing))}" if missing else ""
        raise ConversionError(f"unknown key in config.json ({naming} naming): {', '.join(hints)}{also}")
    if missing:
        raise ConversionError(
            f"config.json ({naming} naming) lacks {', '.join(map(repr, missing))}; state each of them: a default "
            "would build another model"
        )


def _nearest(key, valid):
    return difflib.get_close_matches(key[:100], sorted(valid), n=1, cutoff=0)[0]


def _check_only_values(config):
    for key, allowed in (ONLY_VALUES | OPTIONAL_ONLY_VALUES).items():
        value = config.get(key, allowed)
        same_type = isinstance(value, bool) == isinstance(allowed, bool)
        if value != allowed or not same_type:
            remedy = "; dequantise the checkpoint first" if key == "quantization_config" else ""
            raise ConversionError(f"{key}={shown(value)} is not supported, only {allowed!r}{remedy}")
    shared = config.get("shared_intermediate_size", 0)
    sizes = shared if isinstance(shared, list) else [shared]
    if any(isinstance(size, bool) or size != 0 for size in sizes):
        raise ConversionError(
            f"shared_intermediate_size={shown(shared)} asks for a shared expert, which is not supported; "
            "the released models use 0"
        )


def _integer(config, key):
    value = config[key]
    if not _is_integer(value):
        raise ConversionError(f"{key}={shown(value)} in config.json must be an integer of 64 bits")
    return value


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(config, key):
    value = config[key]
    # Not finite: 1e999 is a number of JSON too.
    if not (_is_integer(value) or isinstance(value, float) and math.isfinite(value)):
        raise ConversionError(f"{key}={shown(value)} in config.json must be a finite number")
    return float(value)


def _boolean(config, key):
    if not isinstance(config[key], bool):
        raise ConversionError(f"{key}={shown(config[key])} in config.json must be true or false")
    return config[key]


def _token_id(config, key):
    value = config.get(key)
    if isinstance(value, list) and (len(value) == 1 or (key == "eos_token_id" and value)):
        # The first one; generation_config.eos_ids reads all of them.
        value = generation_config.as_ids(value, f"{key} in config.json")[0]
    if value is None or _is_integer(value):
        return value
    allowed = "one id, a list of ids" if key == "eos_token_id" else "one id"
    raise ConversionError(f"{key}={shown(value)} in config.json must be {allowed} or null")


def _layer_kinds(config, naming):
    key, kinds = LAYER_KIND_KEYS[naming], LAYER_KIND_VALUES[naming]
    values, length = config[key], _integer(config, "num_hidden_layers")
    if not isinstance(values, list) or len(values) != length:
        size = f"{len(values)} entries" if isinstance(values, list) else shown(values)
        raise ConversionError(f"{key} has {size} for num_hidden_layers={length}; one entry a layer is needed")
    for layer, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str) or value not in kinds:
            raise ConversionError(f"{key}[{layer}]={shown(value)} is not one of {', '.join(map(repr, kinds))}")
    return tuple(kinds[value] for value in values)


def _num_experts(config):
    stated = {key: config[key] for key in ("num_local_experts", "num_experts") if key in config}
    counts = set()
    for key, value in stated.items():
        per_layer = value if isinstance(value, list) else [value]
        if not per_layer or not all(map(_is_integer, per_layer)):
            raise ConversionError(f"{key}={shown(value)} in config.json must be an integer of 64 bits")
        counts |= set(per_layer)
    if len(counts) != 1:
        raise ConversionError(
            f"{shown(stated)} names different numbers of experts; every layer must have the same number"
        )
    return counts.pop()


def _head_dim(config, naming):
    if config["head_dim"] is None and naming == "transformers":  # what that library means by null
        hidden_size, num_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        if num_heads <= 0:
            raise ConversionError(f"num_attention_heads={num_heads} in config.json must be positive")
        return hidden_size // num_heads
    return _integer(config, "head_dim")


def _rope_parameters(config):
    parameters = config.get("rope_parameters")
    if parameters is None:
        return {}
    valid = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    if not isinstance(parameters, dict):
        raise ConversionError(f"rope_parameters={shown(parameters)} in config.json must be an object")
    for key in sorted(set(parameters) - valid):
        raise ConversionError(
            f"unknown key {shown(key)} in rope_parameters of config.json (nearest valid key: {_nearest(key, valid)!r})"
        )
    for key in ("rope_type", "type"):
        if parameters.get(key, "default") != "default":
            raise ConversionError(f"rope_parameters.{key}={shown(parameters[key])} is not supported, only 'default'")
    return parameters


def _rotary_dim(config, head_dim):
    """Spec A.2.4: `rotary_dim`, else the partial rotary factor of `head_dim`, else all of it."""
    parameters = _rope_parameters(config)
    factor = parameters.get("partial_rotary_factor")
    if factor is None:
        factor = config.get("partial_rotary_factor")
    if factor is not None:
        factor = _number({"partial_rotary_factor": factor}, "partial_rotary_factor")
    by_factor = head_dim
    if factor is not None:
        if not 0 <= factor <= 1:
            raise ConversionError(f"partial_rotary_factor={factor} in config.json must lie in [0, 1]")
        by_factor = round(factor * head_dim)
    if config.get("rotary_dim") is None:
        return by_factor
    rotary_dim = _integer(config, "rotary_dim")
    if factor is not None and by_factor != rotary_dim:
        logging.warning("rotary_dim=%d wins over partial_rotary_factor=%g", rotary_dim, factor)
    return rotary_dim


def _rope_theta(config):
    """Top-level `rope_theta` wins: a development build of transformers v5 put its own default in `rope_parameters`."""
    parameters = _rope_parameters(config)
    if config.get("rope_theta") is None:
        if parameters.get("rope_theta") is None:
            raise ConversionError("config.json lacks 'rope_theta', at top level and in 'rope_parameters'; state it")
        return _number(parameters, "rope_theta")
    theta = _number(config, "rope_theta")
    if parameters.get("rope_theta") is not None and _number(parameters, "rope_theta") != theta:
        logging.warning(
            "config.json states rope_theta=%g and rope_parameters.rope_theta=%g: the top-level value is used, "
            "which is right for a model derived from a released one",
            theta,
            _number(parameters, "rope_theta"),
        )
    return theta


def describe(config: ModelConfig) -> str:
    """One line on a model, for reports."""
    kinds = ", ".join(f"{config.layer_kinds.count(kind)} {kind}" for kind in dict.fromkeys(config.layer_kinds))
    return f"{config.num_layers} layers ({kinds}), hidden {config.hidden_size}, {config.num_experts} experts"
