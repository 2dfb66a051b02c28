"""Which classes load an exported folder in transformers: MiniMax's own, transformers', or those shipped from here.

An export names only code that is there and computes the model: MiniMax's files where they were carried along; otherwise
`shipped/`, which is written beside the weights. transformers' own class is named besides where it computes the same.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmx_jax.config import ModelConfig

SHIPPED = tuple(Path(__file__).parent / "shipped" / name for name in ("configuration_mmx.py", "modeling_mmx.py"))
SHIPPED_KEYS = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_mmx.MiniMaxText01Config",
        "AutoModel": "modeling_mmx.MiniMaxText01Model",
        "AutoModelForCausalLM": "modeling_mmx.MiniMaxText01ForCausalLM",
    },
    "model_type": "minimax_text_01",
}
LIGHTNING_NORM_EPS = 1e-6  # in the code of MiniMax and of transformers, where no key of a config changes it


@dataclasses.dataclass(frozen=True)
class ModelCode:
    """The code that an export is loaded with."""

    keys: dict[str, Any]  # of config.json, that name it
    files: tuple[Path, ...] = ()  # to lay beside the weights
    notes: tuple[str, ...] = ()  # lines of the report
    warning: str = ""  # its first line


def choose(config: ModelConfig, naming: str, dtype: str, carried: Collection[str]) -> ModelCode:
    """The code for an export.

    Args:
      config: the model.
      naming: of config.json.
      dtype: of the exported weights.
      carried: names of the files that travel with the weights.
    """
    notes = []
    if config.capacity_factor is not None:
        notes.append(f"the exported model drops no token: capacity_factor={config.capacity_factor:g} is omitted")
    if naming == "original" and (released := _released_code(config, carried)):
        return dataclasses.replace(released, notes=(*notes, *released.notes))
    load = "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
    notes.append(f"in transformers: {load} runs {' and '.join(path.name for path in SHIPPED)} beside the weights")
    keys = SHIPPED_KEYS | {"torch_dtype" if naming == "original" else "dtype": dtype}
    if naming == "original":
        return ModelCode(keys, SHIPPED, tuple(notes))
    if differences := stock_differences(config, dtype):
        warning = (
            f"transformers' own MiniMax class computes another function than this model: {'; '.join(differences)}. "
            f"config.json names the class in {SHIPPED[1].name} instead; load it with {load}"
        )
        return ModelCode(keys, SHIPPED, tuple(notes), warning)
    notes[-1] += "; without trust_remote_code, transformers' own class computes the same logits"
    if "lightning" in config.layer_kinds:
        notes[-1] += ", but decodes wrongly in left-padded batches, in beam search and behind prompts read in pieces"
    return ModelCode(keys | {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax"}, SHIPPED, tuple(notes))


def stock_differences(config: ModelConfig, dtype: str) -> list[str]:
    """Differences of transformers' MiniMaxForCausalLM (5.24) from this model; empty where its logits are the same."""
    out, kinds = [], config.layer_kinds
    if "softmax" in kinds and config.rotary_dim != config.head_dim:
        out.append(f"it rotates all {config.head_dim} dims of a head, where the model rotates {config.rotary_dim}")
    if not config.postnorm:
        out.append("it always keeps the normed input as the residual, where the model has postnorm=False")
    if "lightning" in kinds:
        if config.num_heads & (config.num_heads - 1):
            out.append(f"it has other decay rates for {config.num_heads} heads, which is no power of two")
        if kinds[-1] == "lightning" and config.num_layers > 1:
            out.append("it has other decay rates in a last layer of lightning attention")
        if config.lightning_norm_eps != LIGHTNING_NORM_EPS:
            out.append(f"it has no lightning_norm_eps={config.lightning_norm_eps}")
    if dtype == "bfloat16":
        out.append("with bfloat16 weights it keeps router, decays and lightning states in bfloat16")
    return out


def _released_code(config: ModelConfig, carried: Collection[str]) -> ModelCode | None:
    """MiniMax's own code, if it is among the carried files and computes the model."""
    for name, family in (("minimax_text_01", "MiniMaxText01"), ("minimax_m1", "MiniMaxM1")):
        files = f"configuration_{name}.py", f"modeling_{name}.py"
        if set(files) <= set(carried) and config.lightning_norm_eps == LIGHTNING_NORM_EPS:
            auto_map = {
                "AutoConfig": f"configuration_{name}.{family}Config",
                "AutoModelForCausalLM": f"modeling_{name}.{family}ForCausalLM",
            }
            keys = {"architectures": [f"{family}ForCausalLM"], "auto_map": auto_map, "model_type": name}
            return ModelCode(keys, notes=(f"in transformers: MiniMax's own {' and '.join(files)}, carried along",))
    return None
