"""The one table that relates Hugging Face tensors and parameters, read in both directions.

A row writes both layouts in axis letters: "H3D,M" is a matrix [H*3*D, M] on the Hugging Face side, "M3HD" the
four-dimensional slice [M, 3, H, D] of a parameter. Parameters under `blocks` stack the slices of all blocks on
axis 0 (N), and of all experts on axis 1 (E).
"""

import collections
import dataclasses
import math
import re
from collections import abc

import numpy as np

from mmx_jax.checkpoints.errors import ConversionError, shown
from mmx_jax.checkpoints.safetensors import TensorSpec, summarize
from mmx_jax.config import ModelConfig

# Derived tensors that a transformers save adds; they are recomputed in float32 (spec/text01.md, B.2).
DERIVED = re.compile(r"model\.layers\.(\d{1,9})\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)")
WEIGHT_DTYPES = ("float32", "bfloat16")
MAX_TENSORS = 1_000_000  # of a model; the released one has 8243
STRIP = 32  # rows of a transposition at a time: with 2-byte elements, one cache line


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: `{l}` is the absolute layer, `{i}` its position in the pattern, `{e}` the expert."""

    hf: str
    mmx: str
    hf_axes: str
    mmx_axes: str
    kind: str | None = None  # of the layers it holds for; None: all
    float32: bool = False  # whatever the other parameters are


LAYER, BLOCK = "model.layers.{l}.", "blocks/layer_{i}/"
EXPERT = LAYER + "block_sparse_moe.experts.{e}."
RULES = (
    Rule("model.embed_tokens.weight", "embed/embedding", "V,M", "VM"),
    Rule("model.norm.weight", "final_norm/scale", "M", "M"),
    Rule("lm_head.weight", "lm_head/kernel", "V,M", "VM"),
    Rule(LAYER + "input_layernorm.weight", BLOCK + "attention_norm/scale", "M", "M"),
    Rule(LAYER + "post_attention_layernorm.weight", BLOCK + "mlp_norm/scale", "M", "M"),
    Rule(LAYER + "self_attn.qkv_proj.weight", BLOCK + "attention/qkv", "H3D,M", "M3HD", "lightning"),
    Rule(LAYER + "self_attn.output_gate.weight", BLOCK + "attention/gate", "HD,M", "MHD", "lightning"),
    Rule(LAYER + "self_attn.norm.weight", BLOCK + "attention/norm", "HD", "HD", "lightning"),
    Rule(LAYER + "self_attn.out_proj.weight", BLOCK + "attention/out", "M,HD", "HDM", "lightning"),
    Rule(LAYER + "self_attn.q_proj.weight", BLOCK + "attention/query", "HD,M", "MHD", "softmax"),
    Rule(LAYER + "self_attn.k_proj.weight", BLOCK + "attention/key", "KD,M", "MKD", "softmax"),
    Rule(LAYER + "self_attn.v_proj.weight", BLOCK + "attention/value", "KD,M", "MKD", "softmax"),
    Rule(LAYER + "self_attn.o_proj.weight", BLOCK + "attention/out", "M,HD", "HDM", "softmax"),
    Rule(LAYER + "block_sparse_moe.gate.weight", BLOCK + "mlp/router", "E,M", "ME", float32=True),
    Rule(EXPERT + "w1.weight", BLOCK + "mlp/gate", "F,M", "MF"),
    Rule(EXPERT + "w3.weight", BLOCK + "mlp/up", "F,M", "MF"),
    Rule(EXPERT + "w2.weight", BLOCK + "mlp/down", "M,F", "FM"),
)


@dataclasses.dataclass(frozen=True)
class Mapping:
    """One Hugging Face tensor and the slice `parameter[index]` that holds it."""

    hf: str
    leaf: tuple[str, ...]  # path of the parameter in the tree
    index: tuple[int, ...]  # (), (block,) or (block, expert)
    hf_dims: tuple[int, ...]  # the Hugging Face shape with merged axes taken apart
    hf_shape: tuple[int, ...]
    permutation: tuple[int, ...]
    float32: bool

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return tuple(self.hf_dims[axis] for axis in self.permutation)

    def to_mmx(self, tensor: np.ndarray) -> np.ndarray:
        """[hf_shape] -> [slice_shape], a view."""
        return tensor.reshape(self.hf_dims).transpose(self.permutation)

    def to_hf(self, piece: np.ndarray) -> np.ndarray:
        """[slice_shape] -> [hf_shape], a contiguous copy."""
        out = np.empty(self.hf_shape, piece.dtype)
        copy_strips(self.to_mmx(out), piece)
        return out


def copy_strips(destination: np.ndarray, source: np.ndarray) -> None:
    """`destination[...] = source` of one shape and dtype, several times faster where the two are transposed."""
    raw = np.dtype(f"u{destination.dtype.itemsize}")  # bfloat16 copies element by element through a function pointer
    destination, source = destination.view(raw), source.view(raw)
    fast = [axis for axis, stride in enumerate(destination.strides) if stride == raw.itemsize]
    if not fast or source.strides[fast[-1]] == raw.itemsize:
        destination[...] = source
        return
    axis = fast[-1]
    for start in range(0, destination.shape[axis], STRIP):
        strip = (slice(None),) * axis + (slice(start, start + STRIP),)
        destination[strip] = source[strip]


def expand(config: ModelConfig) -> list[Mapping]:
    """All tensors of a model, the embedding first, then layer by layer, the final norm and the head last."""
    if sum(_tensors(config, config.num_blocks, config.num_experts)) > MAX_TENSORS:
        raise ConversionError(f"{_scale(config)} would be more than {MAX_TENSORS:,} tensors; correct the config")
    return _expand(config, config.num_blocks, config.num_experts)


def _expand(config, num_blocks, num_experts):
    sizes = {
        "V": config.vocab_size,
        "M": config.hidden_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "D": config.head_dim,
        "F": config.mlp_dim,
        "E": config.num_experts,
        "3": 3,
    }
    model_rules, layer_rules = _parted_rules()
    mappings = [_mapping(model_rules[0], sizes)]
    period = len(config.layer_pattern)
    for layer, kind in enumerate(config.layer_pattern * num_blocks):
        block, position = divmod(layer, period)
        for rule in layer_rules:
            if rule.kind in (None, kind):
                experts = range(num_experts) if "{e}" in rule.hf else (None,)
                mappings += [_mapping(rule, sizes, layer, block, position, expert) for expert in experts]
    return mappings + [_mapping(rule, sizes) for rule in model_rules[1:]]


def _parted_rules():
    """(rules of the model, rules of each layer)"""
    of_layers = [rule for rule in RULES if rule.hf.startswith(LAYER)]
    return [rule for rule in RULES if rule not in of_layers], of_layers


def _tensors(config, num_blocks, num_experts):
    """(tensors outside layers, tensors in layers) that `_expand` gives, by arithmetic: a config may claim any size."""
    model_rules, layer_rules = _parted_rules()
    per_kind = {
        kind: sum(num_experts if "{e}" in rule.hf else 1 for rule in layer_rules if rule.kind in (None, kind))
        for kind in set(config.layer_pattern)
    }
    return len(model_rules), num_blocks * sum(map(per_kind.__getitem__, config.layer_pattern))


def _scale(config):
    return f"num_layers={shown(config.num_layers)} with num_experts={shown(config.num_experts)}"


def check_count(config: ModelConfig, present: int, where: str) -> None:
    """Raises ConversionError where a config asks for far more tensors than are there, before they are all named."""
    if sum(_tensors(config, config.num_blocks, config.num_experts)) > 2 * present + 1000:
        raise ConversionError(
            f"{where}: config.json asks for {_scale(config)}, far more than the {present:,} tensors that are there; "
            "one of the two belongs to another model"
        )


def match_parameters(config: ModelConfig, parameters: dict[tuple[str, ...], tuple[int, ...]]) -> list[Mapping]:
    """`expand(config)`, after the first slice of every parameter has shown that config and `parameters` agree.

    Raises:
      ConversionError: as `check_parameters`.
    """
    if sum(_tensors(config, 1, 1)) > 2 * len(parameters) + 1000:
        raise ConversionError(
            f"config.json asks for {_scale(config)}, far more than the {len(parameters):,} parameters that are there"
        )
    check_parameters(config, _expand(config, 1, 1), parameters)
    return expand(config)


def _mapping(rule, sizes, layer=None, block=None, position=None, expert=None):
    hf_letters = rule.hf_axes.replace(",", "")
    return Mapping(
        hf=rule.hf.format(l=layer, e=expert),
        leaf=tuple(rule.mmx.format(i=position).split("/")),
        index=tuple(index for index in (block, expert) if index is not None),
        hf_dims=tuple(sizes[letter] for letter in hf_letters),
        hf_shape=tuple(math.prod(sizes[letter] for letter in group) for group in rule.hf_axes.split(",")),
        permutation=tuple(hf_letters.index(letter) for letter in rule.mmx_axes),
        float32=rule.float32,
    )


def leaf_shapes(config: ModelConfig, mappings: list[Mapping]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every parameter that the mappings fill, by path."""
    prefix = (config.num_blocks, config.num_experts)
    return {mapping.leaf: prefix[: len(mapping.index)] + mapping.slice_shape for mapping in mappings}


def check_parameters(
    config: ModelConfig, mappings: list[Mapping], parameters: dict[tuple[str, ...], tuple[int, ...]]
) -> None:
    """Checks that `parameters` (path -> shape) are exactly those that the mappings fill, each slice once.

    Raises:
      ConversionError: lists the parameters that no rule fills and those that do not exist.
    """
    shapes = leaf_shapes(config, mappings)
    slices = collections.Counter((mapping.leaf, mapping.index) for mapping in mappings)
    if twice := sorted({"/".join(leaf) for (leaf, _), count in slices.items() if count > 1}):
        raise ConversionError(f"parameters filled twice: {summarize(twice)}; see mmx_jax/checkpoints/hf_mapping.py")
    unfilled = sorted("/".join(path) for path in set(parameters) - set(shapes))
    unknown = sorted("/".join(path) for path in set(shapes) - set(parameters))
    if unfilled or unknown:
        raise ConversionError(
            f"parameters and rules differ: no rule fills [{summarize(unfilled)}]; "
            f"the rules fill [{summarize(unknown)}], which the parameters lack"
        )
    for path, shape in shapes.items():
        if tuple(parameters[path]) != shape:
            name = "/".join(path)
            raise ConversionError(f"parameter {name} has shape {tuple(parameters[path])}, the config asks for {shape}")


def check_tensors(
    config: ModelConfig, mappings: list[Mapping], tensors: abc.Mapping[str, TensorSpec], where: str
) -> list[str]:
    """Checks that the tensors of a Hugging Face checkpoint are exactly those that the mappings consume.

    Returns:
      The names of the derived buffers, which are to be dropped.

    Raises:
      ConversionError: lists missing and surplus tensors, or names a tensor of a wrong shape or dtype.
    """
    expected = {mapping.hf: mapping for mapping in mappings}
    kinds = config.layer_kinds
    derived = [name for name in tensors if _is_derived(name, kinds)]
    missing = sorted(set(expected) - set(tensors))
    surplus = sorted(set(tensors) - set(expected) - set(derived))
    if missing or surplus:
        raise ConversionError(
            f"{where}: tensors and config differ: missing [{summarize(missing)}]; surplus [{summarize(surplus)}]"
        )
    dtypes = {}
    for name, mapping in expected.items():
        spec = tensors[name]
        if spec.shape != mapping.hf_shape:
            raise ConversionError(
                f"{where}: {name!r} has shape {list(spec.shape)}, config.json asks for {list(mapping.hf_shape)}"
            )
        allowed = WEIGHT_DTYPES if mapping.leaf not in dtypes or mapping.float32 else (dtypes[mapping.leaf],)
        if spec.dtype.name not in allowed:
            reason = "as the other layers have" if len(allowed) == 1 else "dequantise or cast the checkpoint first"
            raise ConversionError(
                f"{where}: {name!r} has dtype {spec.dtype.name}, expected {' or '.join(allowed)}; {reason}"
            )
        dtypes[mapping.leaf] = spec.dtype.name
    return derived


def _is_derived(name, kinds):
    match = DERIVED.fullmatch(name)
    return bool(match) and int(match[1]) < len(kinds) and kinds[int(match[1])] == "lightning"
