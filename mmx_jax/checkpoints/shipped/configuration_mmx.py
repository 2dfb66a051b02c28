"""Configuration of MiniMax-Text-01 models of any size, for transformers. Written by mmx_jax, beside the weights.

The same model may be described in two namings, which differ in the keys of this table:

| as released (MiniMax-Text-01)         | transformers' MiniMaxConfig                          |
|---------------------------------------|------------------------------------------------------|
| attn_type_list: 0 or 1                | layer_types: "linear_attention" or "full_attention"  |
| layernorm_linear_attention_alpha/beta | linear_attn_alpha_factor / linear_attn_beta_factor   |
| layernorm_full_attention_alpha/beta   | full_attn_alpha_factor / full_attn_beta_factor       |
| layernorm_mlp_alpha/beta              | mlp_alpha_factor / mlp_beta_factor                   |
| rope_theta                            | rope_parameters.rope_theta                           |

Both are read; a configuration is saved in the naming that it was read in. Nothing that changes what the model computes
has a default: a missing key is an error.
"""

from transformers import PretrainedConfig

LIGHTNING, SOFTMAX = "lightning", "softmax"
LAYER_KINDS = {
    "attn_type_list": {0: LIGHTNING, 1: SOFTMAX},
    "layer_types": {"linear_attention": LIGHTNING, "full_attention": SOFTMAX},
}
# (alpha, beta) of the residual behind each kind of sublayer.
RESIDUAL_SCALES = {
    "attn_type_list": {
        LIGHTNING: ("layernorm_linear_attention_alpha", "layernorm_linear_attention_beta"),
        SOFTMAX: ("layernorm_full_attention_alpha", "layernorm_full_attention_beta"),
        "mlp": ("layernorm_mlp_alpha", "layernorm_mlp_beta"),
    },
    "layer_types": {
        LIGHTNING: ("linear_attn_alpha_factor", "linear_attn_beta_factor"),
        SOFTMAX: ("full_attn_alpha_factor", "full_attn_beta_factor"),
        "mlp": ("mlp_alpha_factor", "mlp_beta_factor"),
    },
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "rms_norm_eps",
    "postnorm",
)
# Keys of the released file that select a behaviour of which only one value is computed here.
ONLY_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0,
    "router_jitter_noise": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "shared_intermediate_size": 0,
}


class MiniMaxText01Config(PretrainedConfig):
    """Shapes and constants of one model.

    Args:
      vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim: as everywhere.
        `num_attention_heads * head_dim` need not be `hidden_size`.
      rotary_dim: leading dims of each head that rotate, in softmax layers only; the rest passes unchanged.
      intermediate_size: width of one expert.
      num_local_experts, num_experts_per_tok: experts of each layer, and how many of them a token goes through.
      rms_norm_eps: of all norms but the one inside lightning attention, which has `lightning_norm_eps` (1e-6).
      postnorm: True keeps the normed input as the residual (DeepNorm); False keeps the input itself.
      attn_type_list, or layer_types: the kind of every layer.
      block_size: tokens that lightning attention takes at once. It changes speed and memory, not the result.

    Raises:
      ValueError: a key is missing, or has a value that the model does not compute.
    """

    model_type = "minimax_text_01"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    has_no_defaults_at_init = True

    def __init__(self, **kwargs):
        naming = [key for key in LAYER_KINDS if kwargs.get(key) is not None]
        if len(naming) != 1:
            raise ValueError("config.json must list the kind of every layer: in attn_type_list, or in layer_types")
        scales = [key for pair in RESIDUAL_SCALES[naming[0]].values() for key in pair]
        missing = [key for key in (*REQUIRED, *scales) if kwargs.get(key) is None]
        if _rope_theta(kwargs) is None:
            missing.append("rope_theta")
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}; a default would build another model")
        # transformers fills some of these in on its own accord.
        optional = {"block_size": 256, "lightning_norm_eps": 1e-6, "initializer_range": 0.02}
        optional |= {"router_aux_loss_coef": 0.001, "output_router_logits": False, "tie_word_embeddings": False}
        if naming[0] == "layer_types":
            parameters = kwargs.pop("rope_parameters", None) or {"rope_type": "default"}
            self.rope_parameters = parameters | {"rope_theta": _rope_theta(kwargs | {"rope_parameters": parameters})}
            kwargs.pop("rope_theta", None)
        use_cache = kwargs.pop("use_cache", True)
        super().__init__(**(optional | kwargs))
        self.use_cache = use_cache  # behind the constructor, which takes it for a setting of `generate` and drops it
        self._check()

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        # A file in transformers' naming may say "minimax", for those who load the class of that name.
        config, kwargs = super().get_config_dict(*args, **kwargs)
        return (config | {"model_type": cls.model_type} if config else config), kwargs

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """ "lightning" or "softmax" for every layer."""
        naming = self._naming
        return tuple(LAYER_KINDS[naming][value] for value in getattr(self, naming))

    @property
    def rope_base(self) -> float:
        """The base of the ladder of rotary frequencies."""
        return _rope_theta(self.__dict__)

    def residual_scales(self, kind: str) -> tuple[float, float]:
        """(alpha, beta) behind sublayers of `kind`: "lightning", "softmax" or "mlp"."""
        alpha, beta = RESIDUAL_SCALES[self._naming][kind]
        return getattr(self, alpha), getattr(self, beta)

    @property
    def _naming(self):
        return "layer_types" if self.__dict__.get("layer_types") is not None else "attn_type_list"

    def _check(self):
        for key, only in ONLY_VALUES.items():
            value = getattr(self, key, only)
            if value != only and value != [only]:  # VL-01 writes shared_intermediate_size as a list
                raise ValueError(f"{key}={value!r} is not computed by this class, only {only!r}")
        kinds = getattr(self, self._naming)
        wrong = sorted({repr(kind) for kind in kinds if kind not in LAYER_KINDS[self._naming]})
        if wrong or len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"{self._naming} needs one entry for each of num_hidden_layers={self.num_hidden_layers} layers, out of "
                f"{', '.join(map(repr, LAYER_KINDS[self._naming]))}; it has {len(kinds)} {' '.join(wrong)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}")


def _rope_theta(values):
    top = values.get("rope_theta")
    return top if top is not None else (values.get("rope_parameters") or {}).get("rope_theta")
