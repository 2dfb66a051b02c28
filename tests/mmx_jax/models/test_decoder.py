"""The whole model: against the stored oracle outputs, and the properties that it must have in any shape."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.checkpoints import hf_mapping
from mmx_jax.checkpoints.load import load_params
from mmx_jax.config import REMAT_POLICIES, ModelConfig, RuntimeConfig
from mmx_jax.layers.lightning_attention import decay_slopes
from mmx_jax.layers.moe import route
from mmx_jax.layers.norm import RMSNorm, rms_norm
from mmx_jax.layers.rotary import apply_rotary
from mmx_jax.models.cache import init_state
from mmx_jax.models.decoder import Decoder, DecoderLayer, LayerInputs, embed, head_logits
from mmx_jax.models.params import abstract_params, init_params, logical_axes
from mmx_jax.training.loss import chunked_cross_entropy, load_balancing_loss
from tests.support import oracles
from tests.support.paths import FIXTURES

TEXT = FIXTURES / "text"
VARIANTS = ("tiny", "tiny_bf16")
EDGE_LENGTHS = (1, 15, 16, 17, 32, 33)


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest value, as the oracles were measured."""
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-30))


def assert_trees_close(got, want, tolerance):
    jax.tree.map(functools.partial(assert_close, tolerance=tolerance), got, want)


# Compiling is most of the time here, and the optimisation of machine code is not what is tested.
jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


RUNTIME = RuntimeConfig(lightning_chunk=8, softmax_block=8)  # shorter than the rows


@functools.partial(jit, static_argnames="runtime")
def forward(config, params, tokens, segment_ids=None, state=None, runtime=RUNTIME):
    return Decoder(config, runtime).apply({"params": params}, tokens, segment_ids, state=state)


# --- the oracle


@functools.cache
def tiny(variant):
    """(config, params, oracle arrays) of a fixture, in float32."""
    config, params = load_params(TEXT / variant / "orig", param_dtype="float32")
    config = dataclasses.replace(config, dtype="float32")
    with np.load(TEXT / variant / "oracle.npz") as arrays:
        return config, params, {name: arrays[name] for name in arrays.files}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_layer(config, kind, params, x, slopes):
    """(output, router probabilities) of one layer."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    (y, _, _), captured = DecoderLayer(config, kind).apply(
        {"params": params},
        x,
        LayerInputs(positions, None, None),
        slopes,
        None,
        capture_intermediates=lambda module, _: isinstance(module, RMSNorm),
        mutable=["intermediates"],
    )
    (normed,) = captured["intermediates"]["mlp_norm"]["__call__"]
    rows = normed.reshape(-1, config.hidden_size)
    routing = route(rows, params["mlp"]["router"], config.experts_per_token)
    return y, routing.probability.reshape(*x.shape[:2], -1)


def run_layers(config, params, tokens):
    """(hidden states, embeddings first and the last one normed; router probabilities of every layer; logits)."""
    hidden, routers = [params["embed"]["embedding"][tokens]], []
    slopes = decay_slopes(config.num_layers, config.num_heads)
    for layer, kind in enumerate(config.layer_kinds):
        block, position = divmod(layer, len(config.layer_pattern))
        layer_params = jax.tree.map(lambda p, block=block: p[block], params["blocks"][f"layer_{position}"])
        x, probability = run_layer(config, kind, layer_params, hidden[-1], slopes[layer])
        hidden.append(x)
        routers.append(probability)
    hidden[-1] = rms_norm(hidden[-1], params["final_norm"]["scale"], config.rms_norm_eps)
    return hidden, routers, head_logits(hidden[-1], params["lm_head"]["kernel"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_router_probabilities(variant):
    config, params, oracle = tiny(variant)
    hidden, routers, output = run_layers(config, params, oracle["plain_ids"])
    for i in range(config.num_layers + 1):
        assert_close(hidden[i], oracle[f"plain_hidden_{i}"])
    for i in range(config.num_layers):
        weights = np.exp(np.float64(oracle[f"plain_router_{i}"]))  # the oracle stores logits
        assert_close(routers[i], weights / weights.sum(axis=-1, keepdims=True))
    assert_close(output, oracle["plain_logits"])


@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_logits_at_lengths_around_the_chunk(length):
    for variant in VARIANTS:
        config, params, oracle = tiny(variant)
        assert_close(run_layers(config, params, oracle[f"len{length}_ids"])[2], oracle[f"len{length}_logits"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ["plain", "leftpad", "rightpad"])
def test_logits_and_router_loss_with_padding(variant, rows):
    config, params, oracle = tiny(variant)
    tokens = oracle[f"{rows}_ids"].astype(np.int32)
    mask = oracle[f"{rows}_mask"] if rows != "plain" else np.ones_like(tokens)
    output = forward(config, params, tokens, mask.astype(np.int32))
    real = mask > 0
    assert rows == "plain" or not real.all()
    want = oracle[f"{rows}_logits"]
    assert_close(np.asarray(output.logits)[real], want[real])
    loss, _ = load_balancing_loss(output.router)
    np.testing.assert_allclose(loss, oracle[f"{rows}_aux_loss"], rtol=1e-6)
    assert np.asarray(output.router.tokens).tolist() == [real.sum()] * config.num_layers


@pytest.mark.parametrize("chunk", [16, 256])
def test_logits_of_600_tokens(chunk):
    for variant in VARIANTS:
        config, params, oracle = tiny(variant)
        runtime = RuntimeConfig(lightning_chunk=chunk, softmax_block=chunk)
        output = forward(config, params, oracle["long_ids"].astype(np.int32), runtime=runtime)
        assert_close(output.logits, oracle["long_logits_b256"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_states_and_keys_and_values(variant):
    config, params, oracle = tiny(variant)
    tokens = oracle["plain_ids"].astype(np.int32)
    output = forward(config, params, tokens, state=init_state(config, *tokens.shape))
    for i in range(7):
        assert_close(output.state.layers[f"layer_{i}"][0], oracle[f"plain_state_{i}"], 2e-5)
    cache = output.state.layers["layer_7"]
    assert_close(cache.key[0], oracle["plain_k_7"])
    assert_close(cache.value[0], oracle["plain_v_7"])
    assert_close(output.logits, oracle["plain_logits"])


def next_token_loss(config, params, tokens):
    """(loss, (cross entropy, router loss)) as in docs/model.md, "Losses"."""
    output = Decoder(config, RUNTIME).apply({"params": params}, tokens, logits=False)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    entropy = chunked_cross_entropy(output.hidden, params["lm_head"]["kernel"], targets, chunk=32)
    aux, _ = load_balancing_loss(output.router)
    return entropy.objective / entropy.count + config.router_aux_loss_coef * aux, aux


def hugging_face_gradients(config, gradients):
    """{name: array} in the transformers port's module names, its fused experts included."""
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    named = {m.hf: m.to_hf(np.asarray(leaves[m.leaf][m.index])) for m in hf_mapping.expand(config)}
    named |= {name.replace("block_sparse_moe.gate", "mlp.gate"): gradient for name, gradient in named.items()}
    for layer in range(config.num_layers):
        experts = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for e in range(config.num_experts)]
        fused = f"model.layers.{layer}.mlp.experts"
        named[f"{fused}.gate_up_proj"] = np.stack(
            [np.concatenate([named[f"{e}.w1.weight"], named[f"{e}.w3.weight"]]) for e in experts]
        )
        named[f"{fused}.down_proj"] = np.stack([named[f"{e}.w2.weight"] for e in experts])
    return named


def test_training_loss_and_gradients():
    config, params, oracle = tiny("tiny")
    gradient = jax.jit(jax.value_and_grad(functools.partial(next_token_loss, config), has_aux=True))
    (loss, aux), gradients = gradient(params, oracle["plain_ids"].astype(np.int32))
    np.testing.assert_allclose(loss, oracle["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(aux, oracle["train_aux_loss"], rtol=1e-6)
    named = hugging_face_gradients(config, gradients)
    stored = [name.removeprefix("grad::") for name in oracle if name.startswith("grad::")]
    assert len(stored) == 11
    for name in stored:
        assert_close(named[name], oracle[f"grad::{name}"])


# --- constants and counts


def test_slopes():
    slopes = decay_slopes(80, 64)
    want = {
        0: [0.917013213, 0.840904824, 0.500005, 0.062500625, 0.00390628906],
        1: [0.905405567, 0.830260566, 0.493675886, 0.0617094858, 0.00385684286],
        40: [0.452707369, 0.415134487, 0.246840443, 0.0308550554, 0.00192844096],
        78: [0.0116168162, 0.0106526674, 0.00633411392, 0.000791764241, 4.9485265e-05],
    }
    assert slopes.dtype == np.float32 and slopes.shape == (80, 64)
    for layer, values in want.items():
        np.testing.assert_allclose(slopes[layer][[0, 1, 7, 31, 63]], values, rtol=1e-6)


def test_slopes_of_other_head_counts_and_depths():
    np.testing.assert_allclose(
        decay_slopes(1, 6), [np.array([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]) * (1 + 1e-5)], rtol=1e-7
    )
    for heads in (1, 4, 12, 20):
        np.testing.assert_allclose(decay_slopes(3, heads)[1], oracles.alibi_slopes(heads) * (0.5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(decay_slopes(3, 8)[2], oracles.alibi_slopes(8) * 1e-5, rtol=1e-5)  # the last layer


def test_released_parameter_counts():
    """Spec B.4, without allocating a parameter. Active: 2 of 32 experts, embedding and head left out."""
    config = ModelConfig()
    params = abstract_params(config)
    assert sum(p.size for p in jax.tree.leaves(params)) == 456_089_655_296
    flat = {jax.tree_util.keystr(path): p.size for path, p in jax.tree_util.tree_leaves_with_path(params)}
    experts = sum(size for name, size in flat.items() if re.search(r"'mlp'\]\['(gate|up|down)'", name))
    assert experts == 434_865_438_720
    vocabulary = params["embed"]["embedding"].size + params["lm_head"]["kernel"].size
    unused = experts * (config.num_experts - config.experts_per_token) // config.num_experts
    assert sum(flat.values()) - unused - vocabulary == 45_944_920_064
    axes = logical_axes(config)
    jax.tree.map(lambda p, a: None if p.ndim == len(a) else pytest.fail(f"{p.shape} {a}"), params, axes)


def test_router_is_float32_whatever_the_parameters_are():
    params = abstract_params(small_config(param_dtype="bfloat16"))
    dtypes = {jax.tree_util.keystr(path): p.dtype for path, p in jax.tree_util.tree_leaves_with_path(params)}
    assert all(dtype == ("float32" if "router" in name else "bfloat16") for name, dtype in dtypes.items())


def test_initialisation_is_xavier_with_the_deepnorm_gain():
    config = small_config(hidden_size=64, mlp_dim=128)
    layer = jit(init_params)(config, jax.random.key(0))["blocks"]["layer_0"]
    gain = (8 * config.num_layers) ** -0.25
    for name, leaf, fans in (("gate", layer["mlp"]["gate"], 64 + 128), ("out", layer["attention"]["out"], 32 + 64)):
        np.testing.assert_allclose(np.std(leaf), gain * (2 / fans) ** 0.5, rtol=0.05, err_msg=name)
    query_key, value = layer["attention"]["qkv"][:, :, :2], layer["attention"]["qkv"][:, :, 2]
    np.testing.assert_allclose(np.std(query_key), (2 / (64 + 32)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(value), gain * (2 / (64 + 32)) ** 0.5, rtol=0.05)


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = 1e-3 * rng.normal(size=(3, 5, 16)), rng.normal(size=16)  # so small that eps counts
    for eps in (1e-5, 1e-6):
        want = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale
        np.testing.assert_allclose(rms_norm(np.float32(x), np.float32(scale), eps), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rotary_dim", [0, 6, 16])
def test_rotary(rotary_dim):
    """Spec C.4: the first dims, pairs (i, i + rotary_dim / 2), exponents over rotary_dim; positions up to 2^17."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3], [7, 100, 5000, 131072]])
    theta, half = 1e4, rotary_dim // 2
    want = x.astype(np.float64)
    for b, t in np.ndindex(positions.shape):
        for i in range(half):
            angle = positions[b, t] * theta ** (-2 * i / rotary_dim)
            a, c = x[b, t, :, i].astype(np.float64), x[b, t, :, i + half].astype(np.float64)
            want[b, t, :, i] = a * np.cos(angle) - c * np.sin(angle)
            want[b, t, :, i + half] = c * np.cos(angle) + a * np.sin(angle)
    got = apply_rotary(x, jnp.asarray(positions), rotary_dim=rotary_dim, theta=theta)
    # An angle of 2^17 has an error of 2^17 * 2^-24 in float32, as in every implementation.
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=5e-2)
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


# --- properties, on a model of two hybrid blocks


def small_config(**changes):
    values = dict(
        vocab_size=64,
        hidden_size=24,
        num_layers=4,
        layer_pattern=("lightning", "softmax"),
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=4,
        rope_theta=1e4,
        mlp_dim=32,
        num_experts=4,
        experts_per_token=2,
        lightning_alpha=1.3,
        softmax_alpha=1.7,
        mlp_alpha=1.5,
        lightning_beta=0.9,
        softmax_beta=1.1,
        mlp_beta=0.8,
        dtype="float32",
    )
    return ModelConfig(**(values | changes))


@functools.cache
def small_params(config):
    params = jit(init_params)(config, jax.random.key(0))
    noise = np.random.default_rng(5)  # norm scales that are not all one
    return jax.tree_util.tree_map_with_path(
        lambda path, p: (
            p * noise.uniform(0.5, 1.5, p.shape).astype(p.dtype) if path[-1].key in ("scale", "norm") else p
        ),
        params,
    )


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)


@functools.partial(jit, static_argnames="runtime")
def weighted_outputs(config, params, tokens, segment_ids, weights, runtime=RUNTIME):
    """Gradients of sum(weights [B, T, V] * logits) + a function of the router; (logits, stats) beside them."""

    def objective(params):
        output = Decoder(config, runtime).apply({"params": params}, tokens, segment_ids)
        # Sums over tokens, so that they add up over documents, however these are laid out.
        router = jnp.sum(output.router.probability * jnp.arange(config.num_experts))
        return jnp.sum(weights * output.logits) + router, (output.logits, output.router)

    return jax.grad(objective, has_aux=True)(params)


@pytest.mark.parametrize("layout", ["adjacent", "padded_between"])
def test_packed_equals_separate(layout):
    """Three documents in one row against one document a row: logits, router sums and gradients."""
    config = small_config()
    params = small_params(config)
    documents = random_tokens(3, 9)
    weights = np.random.default_rng(1).normal(size=(3, 9, 64)).astype(np.float32)
    want_gradient, (want_logits, want_stats) = weighted_outputs(config, params, documents, None, weights)
    starts, length = {"adjacent": ([0, 9, 18], 27), "padded_between": ([2, 14, 23], 35)}[layout]
    tokens, segment_ids = random_tokens(1, length, seed=2), np.zeros((1, length), np.int32)
    row_weights = np.zeros((1, length, 64), np.float32)
    for i, start in enumerate(starts):
        part = np.s_[0, start : start + 9]
        tokens[part], segment_ids[part], row_weights[part] = documents[i], [5, 2, 5][i], weights[i]
    gradient, (logits, stats) = weighted_outputs(config, params, tokens, segment_ids, row_weights)
    packed_logits = np.stack([logits[0, start : start + 9] for start in starts])
    assert_close(packed_logits, want_logits)
    assert_trees_close(stats, want_stats, 1e-5)
    assert_trees_close(gradient, want_gradient, 1e-5)


def assert_same_function(config, **changes):
    """That another runtime computes the same: logits and gradients."""
    params, tokens = small_params(config), random_tokens(3, 9)
    weights = np.random.default_rng(1).normal(size=(3, 9, 64)).astype(np.float32)
    want_gradient, (want_logits, _) = weighted_outputs(config, params, tokens, None, weights)
    gradient, (logits, _) = weighted_outputs(
        config, params, tokens, None, weights, runtime=dataclasses.replace(RUNTIME, **changes)
    )
    assert_close(logits, want_logits, 1e-6)
    assert_trees_close(gradient, want_gradient, 2e-6)


def test_scan_equals_unrolled():
    assert_same_function(small_config(), scan_blocks=False)


@pytest.mark.parametrize("policy", [policy for policy in REMAT_POLICIES if policy != "none"])
def test_rematerialisation_changes_nothing(policy):
    config = small_config(layer_pattern=("lightning",), num_layers=2)
    assert_same_function(config, remat=policy)


def test_scanned_blocks_equal_layers_one_after_another():
    """Two blocks: parameters, slopes and router sums of layer l are those of block l // P, position l % P."""
    config = small_config()
    params, tokens = small_params(config), random_tokens(2, 27)
    hidden, routers, logits = run_layers(config, params, tokens)
    output = forward(config, params, tokens)
    assert_close(output.hidden, hidden[-1], 2e-6)
    assert_close(output.logits, logits, 2e-6)
    assert_close(output.router.probability, np.stack([np.sum(p, axis=(0, 1)) for p in routers]), 2e-6)


def count_operations(config, length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, length, 64), jnp.float32)
    text = weighted_outputs.lower(config, abstract_params(config), tokens, tokens, weights).as_text()
    return len(re.findall(r" = ", text))


def test_number_of_operations_depends_on_neither_depth_nor_length():
    # Of lengths above 128: fewer assignments than two for each of these are sorted in another way.
    want = count_operations(small_config(), 136)
    assert want > 500
    assert count_operations(small_config(num_layers=12), 136) == want
    assert count_operations(small_config(), 256) == want


ARCHITECTURES = {
    "hybrid": dict(),
    "prenorm": dict(postnorm=False),
    "pure_softmax": dict(layer_pattern=("softmax",), num_layers=2),
    "pure_lightning": dict(layer_pattern=("lightning",), num_layers=2),
    "aperiodic": dict(layer_pattern=("softmax", "lightning", "lightning"), num_layers=3),
    "dense": dict(num_experts=1, experts_per_token=1),
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_causal(architecture):
    """A later token changes nothing before it, to the bit, and something from it on."""
    config = small_config(**ARCHITECTURES[architecture])
    params, tokens = small_params(config), random_tokens(2, 27)
    before = np.asarray(forward(config, params, tokens).logits)
    assert np.all(np.isfinite(before))
    t = 13  # inside a chunk
    tokens[:, t] = (tokens[:, t] + 1) % 64
    after = np.asarray(forward(config, params, tokens).logits)
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert np.all(np.any(after[:, t:] != before[:, t:], axis=-1))


def test_prenorm_keeps_the_raw_residual():
    """With projections that give zero, prenorm only scales the embedding, and postnorm norms it too."""
    tokens = random_tokens(2, 27)
    for postnorm in (False, True):
        config = small_config(postnorm=postnorm)
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.zeros_like(p) if path[-1].key in ("out", "down") else p, small_params(config)
        )
        x = params["embed"]["embedding"][tokens]
        for kind in config.layer_kinds:
            x = x * config.residual_scales(kind)[0] * config.mlp_alpha
        want = rms_norm(x, params["final_norm"]["scale"], config.rms_norm_eps)
        close = np.allclose(forward(config, params, tokens).hidden, want, rtol=1e-5)
        assert close != postnorm


def test_bfloat16_stays_close_to_float32():
    config = small_config()
    params, tokens = small_params(config), random_tokens(2, 27)
    want = np.float64(forward(config, params, tokens).logits)
    output = forward(dataclasses.replace(config, dtype="bfloat16"), params, tokens)
    assert output.hidden.dtype == jnp.bfloat16 and output.logits.dtype == jnp.float32
    error = np.linalg.norm(output.logits - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert 1e-4 < np.median(error) < 2e-2  # a few tokens choose another expert, and those may differ more


def test_chunked_continuation_equals_whole():
    """A ragged batch in pieces of 16, 1 and 16 tokens; one row has none in the second piece."""
    config = small_config()
    params, tokens = small_params(config), random_tokens(2, 33)
    counts = np.array([[16, 1, 11], [7, 0, 16]])  # tokens of each row in each piece
    lengths = counts.sum(axis=1)
    token_mask = np.arange(33) < lengths[:, None]
    whole = forward(config, params, tokens, token_mask.astype(np.int32), init_state(config, 2, 48))
    state, logits, begins = init_state(config, 2, 48), np.zeros_like(whole.logits), np.zeros(2, int)
    for width, own in zip((16, 1, 16), counts.T, strict=True):
        piece_mask = np.arange(width) < own[:, None]
        piece = np.zeros((2, width), np.int32)
        for row, (begin, count) in enumerate(zip(begins, own, strict=True)):
            piece[row, :count] = tokens[row, begin : begin + count]
        output = forward(config, params, piece, piece_mask.astype(np.int32), state)
        state = output.state
        for row, (begin, count) in enumerate(zip(begins, own, strict=True)):
            logits[row, begin : begin + count] = output.logits[row, :count]
        begins += own
    assert_close(logits[token_mask], np.asarray(whole.logits)[token_mask])
    for name in state.layers:
        assert_trees_close(
            jax.tree.map(lambda s: filled_slots(s, lengths), state.layers[name]),
            jax.tree.map(lambda s: filled_slots(s, lengths), whole.state.layers[name]),
            2e-5,
        )
    assert np.asarray(state.lengths).tolist() == lengths.tolist()
    stateless = forward(config, params, tokens, token_mask.astype(np.int32))
    assert_close(np.asarray(stateless.logits)[token_mask], np.asarray(whole.logits)[token_mask])


def test_rows_at_different_lengths_decode_together_as_each_alone():
    """The cache has a write position for each row: rows join a batch whenever they come, and pause."""
    config = small_config()
    params, tokens = small_params(config), random_tokens(3, 12)
    prompts, steps, slots = [9, 1, 4], 3, 12
    alone = []
    for row, length in enumerate(prompts):
        own = tokens[row : row + 1]
        state = forward(config, params, own[:, :length], state=init_state(config, 1, slots)).state
        for step in range(steps):
            output = forward(config, params, own[:, length + step, None], state=state)
            state = output.state
        alone.append((output.logits[0, 0], state))
    # One batch of the caches after the prompts; in each step another row has no token.
    states = [
        forward(config, params, tokens[row : row + 1, :length], state=init_state(config, 1, slots)).state
        for row, length in enumerate(prompts)
    ]
    state = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0 if leaves[0].ndim == 1 else 1), *states)
    done, logits = np.zeros(3, int), [None] * 3
    while np.any(done < steps):
        token_mask = (done < steps) & (np.arange(3) != done.sum() % 3)
        token = np.array([tokens[row, prompts[row] + min(done[row], steps - 1)] for row in range(3)])
        output = forward(config, params, token[:, None], token_mask[:, None].astype(np.int32), state)
        state = output.state
        done += token_mask
        for row in np.flatnonzero(token_mask):
            logits[row] = output.logits[row, 0]
    assert np.asarray(state.lengths).tolist() == [12, 4, 7]
    for row, (want, want_state) in enumerate(alone):
        assert_close(logits[row], want)
        own = jax.tree.map(lambda s, row=row: s[:, row : row + 1], state.layers)
        filled = functools.partial(filled_slots, lengths=[prompts[row] + steps], slots=slots)
        assert_trees_close(jax.tree.map(filled, own), jax.tree.map(filled, want_state.layers), 2e-5)


@pytest.mark.parametrize("pattern", [("lightning", "softmax"), ("lightning",) * 3 + ("softmax",), ("lightning",) * 4])
def test_last_positions_alone_are_those_of_all(pattern):
    """Scanned and single blocks, with either kind of layer last; a ragged second piece after a ragged first one."""
    config = small_config(layer_pattern=pattern)
    params, tokens = small_params(config), random_tokens(2, 25)
    real = np.ones((2, 25), np.int32)
    real[0, 20:], real[1, 6:9], real[1, 23:] = 0, 0, 0
    state = forward(config, params, tokens[:, :9], real[:, :9], init_state(config, 2, 32)).state
    whole = forward(config, params, tokens[:, 9:], real[:, 9:], state)
    last = np.array([10, 13])
    alone = jit(
        lambda config, *inputs: Decoder(config, RUNTIME).apply(
            {"params": inputs[0]}, *inputs[1:3], state=state, last=last
        )
    )(config, params, tokens[:, 9:], real[:, 9:])
    assert alone.logits.shape == (2, 1, config.vocab_size)
    assert_close(alone.logits[:, 0], np.asarray(whole.logits)[np.arange(2), last], 2e-6)
    assert_trees_close(alone.state, whole.state, 1e-6)


def filled_slots(leaf, lengths, slots=48):
    """Keys and values [N, B, K, S, D] at filled slots alone: what lies in the others is never read."""
    if leaf.ndim != 5 or leaf.shape[3] != slots:
        return leaf
    filled = np.arange(slots) < np.asarray(lengths)[:, None]
    return np.asarray(leaf) * filled[None, :, None, :, None]


def test_embeddings_may_be_given_in_place_of_tokens():
    """As those of an image are: `embed` is a step of its own, and rows that are replaced are read like any other."""
    config = small_config()
    params, tokens = small_params(config), random_tokens(2, 11)
    embeddings = embed(config, params, tokens)
    model = Decoder(config, RUNTIME)

    @jax.jit
    def forward_of(embeddings, state=None):
        return model.apply({"params": params}, None, embeddings=embeddings, state=state)

    want = forward(config, params, tokens)
    assert_close(forward_of(embeddings).logits, want.logits, 1e-6)
    # Token 5 of a row becomes another one, by its embedding alone: what is before it stays, bit for bit.
    other = tokens.copy()
    other[:, 5] = (tokens[:, 5] + 1) % 64
    merged = embeddings.at[:, 5].set(params["embed"]["embedding"][other[:, 5]])
    got = forward_of(merged)
    assert_close(got.logits, forward(config, params, other).logits, 1e-6)
    np.testing.assert_array_equal(got.logits[:, :5], forward_of(embeddings).logits[:, :5])
    assert np.all(np.any(np.asarray(got.logits)[:, 5:] != np.asarray(want.logits)[:, 5:], axis=-1))
    # In prefill, and differentiable.
    state = forward_of(merged, init_state(config, 2, 16)).state
    assert_trees_close(state.layers, forward(config, params, other, state=init_state(config, 2, 16)).state.layers, 1e-6)
    gradient = jax.grad(lambda x: jnp.sum(forward_of(x).logits[:, 7]))(embeddings)
    assert np.any(gradient[:, :8]) and not np.any(gradient[:, 8:])
