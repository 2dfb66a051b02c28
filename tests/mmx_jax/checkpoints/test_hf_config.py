"""config.json of Hugging Face checkpoints, in both namings."""

import dataclasses
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.checkpoints import hf_mapping
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import NAMINGS, detect_naming, model_config_from_hf, model_config_to_hf
from mmx_jax.checkpoints.load import resolve
from mmx_jax.checkpoints.open import open_tensors
from mmx_jax.config import ConfigError, ModelConfig, shortest_period
from tests.support.checkpoint_files import (
    HF,
    ORIGINAL,
    hf_config,
)


@pytest.mark.parametrize("claim", [10**4, 10**6, 10**9, 2**62, 10**4000])
@pytest.mark.parametrize("key", ["num_local_experts", "num_hidden_layers"])
def test_claims_are_compared_with_the_weights_before_work_grows_with_them(source, key, claim):
    config = hf_config(source) | {key: claim}
    if key == "num_hidden_layers" and claim <= 10**6:
        config["attn_type_list"] = [0] * claim
    (source / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    refused = "far more than the 155 tensors|64 bits|entries|larger than any array|is more than 100,000"
    with pytest.raises((ConversionError, ConfigError), match=refused):
        open_tensors(resolve(source))
    assert time.process_time() - start < 30


def test_claims_of_our_own_config_are_compared_with_the_parameters():
    config = model_config_from_hf(hf_config())
    shapes = hf_mapping.leaf_shapes(config, hf_mapping.expand(config))
    assert hf_mapping.match_parameters(config, shapes) == hf_mapping.expand(config)
    for change in (
        {"num_experts": 10**9},
        {"num_layers": 8 * 10**9},
        {"num_layers": 10**6, "layer_pattern": ("lightning",) * (10**6 - 1) + ("softmax",)},
        {"num_experts": 10**4000},
    ):
        # Some no longer make a config.
        refused = "has shape|far more|64 bits|larger than any array|is more than 100,000"
        with pytest.raises((ConversionError, ConfigError), match=refused) as caught:
            hf_mapping.match_parameters(dataclasses.replace(config, **change), shapes)
        assert len(str(caught.value)) < 10_000
    with pytest.raises(ConversionError, match="more than 1,000,000 tensors"):
        hf_mapping.expand(dataclasses.replace(config, num_experts=10**9))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": float("inf")},
        {"rms_norm_eps": 10**400},
        {"vocab_size": 10**4000},
        {"num_attention_heads": 0, "head_dim": None},
        {"head_dim": 2**62, "rotary_dim": None, "partial_rotary_factor": 1e300},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": {"a": [1]}}},
        {"hidden_act": [["x" * 10**6]]},
        {"layer_types": [["full_attention"]] * 8},
        {f"key_{i}": 0 for i in range(3000)},
        {"k" * 10**6: 0},
        {"num_local_experts": list(range(10**5))},
    ],
    ids=lambda change: next(iter(change))[:20],
)
def test_odd_values_of_a_config_are_one_short_error(change):
    start = time.process_time()
    with pytest.raises((ConversionError, ConfigError)) as caught:
        model_config_from_hf(hf_config(HF) | change)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < 30


def test_both_namings_of_one_model_give_one_config():
    config = model_config_from_hf(hf_config(ORIGINAL))
    assert config == model_config_from_hf(hf_config(HF))
    assert config.layer_pattern == ("lightning",) * 7 + ("softmax",)
    assert (config.rotary_dim, config.rope_theta, config.postnorm, config.num_kv_heads) == (16, 1e7, True, 2)
    assert config.lightning_norm_eps == 1e-6


def test_m1_config_loads():
    m1 = hf_config() | {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}
    assert model_config_from_hf(m1) == model_config_from_hf(hf_config())


positive = st.integers(1, 64)
scale = st.floats(0.1, 10)


@st.composite
def model_configs(draw):
    kinds = draw(st.lists(st.sampled_from(["lightning", "softmax"]), min_size=1, max_size=9))
    head_dim, kv_heads, experts = draw(positive), draw(st.integers(1, 4)), draw(st.integers(1, 8))
    pattern = shortest_period(tuple(kinds))
    return ModelConfig(
        vocab_size=draw(positive),
        hidden_size=draw(positive),
        num_layers=len(kinds),
        layer_pattern=pattern,
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        rope_theta=draw(st.floats(1, 1e8)),
        max_position_embeddings=draw(positive),
        mlp_dim=draw(positive),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        postnorm=draw(st.booleans()),
        lightning_alpha=draw(scale),
        lightning_beta=draw(scale),
        softmax_alpha=draw(scale),
        softmax_beta=draw(scale),
        mlp_alpha=draw(scale),
        mlp_beta=draw(scale),
        rms_norm_eps=draw(st.floats(1e-8, 1e-3)),
        lightning_norm_eps=draw(st.floats(1e-8, 1e-3)),
        eos_token_id=draw(st.none() | positive),
    )


@settings(max_examples=60, deadline=None)
@given(config=model_configs(), naming=st.sampled_from(NAMINGS))
def test_config_round_trip(config, naming):
    hf = json.loads(json.dumps(model_config_to_hf(config, naming)))
    assert detect_naming(hf) == naming
    assert model_config_from_hf(hf) == config


def test_written_config_is_the_released_one():
    written = model_config_to_hf(model_config_from_hf(hf_config()), "original")
    assert written == hf_config() | {"pad_token_id": None}
    written = model_config_to_hf(model_config_from_hf(hf_config(HF)), "transformers")
    assert written["architectures"] == ["MiniMaxForCausalLM"] and written["block_size"] == 256
    assert written["rope_parameters"] == {"partial_rotary_factor": 0.5, "rope_theta": 1e7, "rope_type": "default"}
    assert set(hf_config(HF)) - set(written) == {"transformers_version"}


INERT = {
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "use_cache",
    "output_router_logits",
    "dtype",
}
ABSENT_IS_NONE = {"bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.parametrize("folder", [ORIGINAL, HF], ids=NAMINGS)
def test_no_key_that_matters_has_a_default(folder):
    harmless = INERT | ABSENT_IS_NONE | {"shared_moe_mode"}
    if folder is HF:  # extras there, of which rotary_dim falls back on the partial rotary factor
        harmless |= {"block_size", "postnorm", "rotary_dim", "shared_intermediate_size"}
    for key in hf_config(folder):
        config = hf_config(folder)
        del config[key]
        if key in harmless:
            model_config_from_hf(config)
        else:
            with pytest.raises(ConversionError, match="rope_theta" if key == "rope_parameters" else key):
                model_config_from_hf(config)


def test_unknown_key_is_named_with_the_nearest():
    with pytest.raises(ConversionError, match="'rotary_dims'.*nearest valid key: 'rotary_dim'"):
        model_config_from_hf(hf_config() | {"rotary_dims": 8})
    with pytest.raises(ConversionError, match="'rope_thetas'.*'rope_theta'"):
        model_config_from_hf(hf_config(HF) | {"rope_parameters": {"rope_thetas": 1.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantise"),
        ({"shared_intermediate_size": [9216]}, "shared expert"),
        ({"num_local_experts": [4, 4, 2]}, "num_local_experts"),
        ({"attn_type_list": [0] * 7}, "attn_type_list has 7 entries"),
        ({"attn_type_list": [0] * 7 + [2]}, r"attn_type_list\[7\]=2"),
        ({"layer_types": ["full_attention"] * 8}, "both"),
        ({"num_attention_heads": 4.5}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"postnorm": 1}, "postnorm"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(hf_config() | change)


def test_traps_of_the_config():
    plain = model_config_from_hf(hf_config())
    assert model_config_from_hf(hf_config() | {"shared_intermediate_size": [0]}) == plain
    assert model_config_from_hf(hf_config() | {"num_local_experts": [4] * 8}) == plain
    with pytest.raises(ConversionError, match="neither"):
        model_config_from_hf({key: value for key, value in hf_config().items() if key != "attn_type_list"})

    hf = hf_config(HF)
    both = hf | {"rope_theta": 1e7, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert model_config_from_hf(both).rope_theta == 1e7
    without = {key: value for key, value in hf.items() if key != "rotary_dim"}
    assert model_config_from_hf(without).rotary_dim == 32
    half = without | {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}}
    assert model_config_from_hf(half).rotary_dim == 8
    assert model_config_from_hf(half | {"rotary_dim": 16}).rotary_dim == 16
    assert model_config_from_hf({k: v for k, v in hf.items() if k != "postnorm"}).postnorm is True
    with pytest.raises(ConversionError, match="rope_type"):
        model_config_from_hf(hf | {"rope_parameters": {"rope_theta": 1e7, "rope_type": "yarn"}})
