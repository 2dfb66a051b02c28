"""Checkpoints of the fixtures, read by the safetensors package: the oracle of conversion."""

import json

import numpy as np
import safetensors.numpy

from mmx_jax.checkpoints import orbax_slices
from mmx_jax.convert.verify import verify_checkpoints
from tests.support.paths import FIXTURES

TEXT = FIXTURES / "text"
HF, ORIGINAL, BF16 = TEXT / "tiny" / "hf", TEXT / "tiny" / "orig", TEXT / "tiny_bf16" / "orig"
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def hf_config(folder=ORIGINAL):
    return json.loads((folder / "config.json").read_text())


def read_all(folder):
    """Every tensor of a folder, by the safetensors package."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def is_derived(name):
    return name.endswith(("slope_rate", "query_decay", "key_decay", "diagonal_decay"))


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def expected_parameters(tensors, config):
    """The parameter tree of the plan, written out by hand for the tiny fixtures (one block)."""
    h, k, d, m = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    out = {
        "embed/embedding": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
        "lm_head/kernel": tensors["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"blocks/layer_{layer}/", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        out[ours + "attention_norm/scale"] = tensors[theirs + "input_layernorm.weight"][None]
        out[ours + "mlp_norm/scale"] = tensors[theirs + "post_attention_layernorm.weight"][None]
        if layer < 7:
            qkv = tensors[attention + "qkv_proj.weight"]
            split = np.stack([qkv[head * 3 * d : (head + 1) * 3 * d].reshape(3, d, m) for head in range(h)])
            out[ours + "attention/qkv"] = np.einsum("hcdm->mchd", split)[None]
            out[ours + "attention/gate"] = tensors[attention + "output_gate.weight"].T.reshape(1, m, h, d)
            out[ours + "attention/norm"] = tensors[attention + "norm.weight"].reshape(1, h, d)
            out[ours + "attention/out"] = tensors[attention + "out_proj.weight"].T.reshape(1, h, d, m)
        else:
            out[ours + "attention/query"] = tensors[attention + "q_proj.weight"].T.reshape(1, m, h, d)
            out[ours + "attention/key"] = tensors[attention + "k_proj.weight"].T.reshape(1, m, k, d)
            out[ours + "attention/value"] = tensors[attention + "v_proj.weight"].T.reshape(1, m, k, d)
            out[ours + "attention/out"] = tensors[attention + "o_proj.weight"].T.reshape(1, h, d, m)
        moe = theirs + "block_sparse_moe."
        out[ours + "mlp/router"] = tensors[moe + "gate.weight"].T[None]
        for name, weight in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            experts = [tensors[f"{moe}experts.{e}.{weight}.weight"].T for e in range(config.num_experts)]
            out[ours + f"mlp/{name}"] = np.stack(experts)[None]
    return out


def flat(tree):
    return {"/".join(path): np.asarray(leaf) for path, leaf in orbax_slices.flatten(tree).items()}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def verify(first, second, **kw):
    lines = []
    return verify_checkpoints(first, second, lines.append, **kw), lines
