"""A peer agrees: stock transformers on exported weights, and its own saves here (extra `parity`).

The stock port rotates all of the head dim, so the models here have rotary_dim == head_dim. Its slope factor is
1 - l / (L - 1 + 1e-5), at most 1e-5 off in relative terms where the last layer is softmax attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.checkpoints.load import load_params, save_huggingface
from mmx_jax.config import ModelConfig
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import init_params
from mmx_jax.training.loss import chunked_cross_entropy, load_balancing_loss

torch = pytest.importorskip("torch", reason="needs the extra `parity`: make parity")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`: make parity")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the peer's own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VOCAB, LENGTH = 96, 300  # more than one of the peer's blocks of 256
TOLERANCE = 1e-5

SHAPES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=16,
    rope_theta=1e4,
    max_position_embeddings=512,
    mlp_dim=48,
    num_experts=4,
    experts_per_token=2,
    lightning_alpha=1.3,
    softmax_alpha=1.7,
    mlp_alpha=1.5,
    lightning_beta=0.9,
    softmax_beta=1.1,
    mlp_beta=0.8,
    router_aux_loss_coef=0.01,
    dtype="float32",
)
PATTERNS = {"hybrid": ("lightning", "softmax"), "aperiodic": ("softmax", "lightning", "lightning", "softmax")}


def random_tokens(rows=2):
    return np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)


def left_padding():
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, :70] = 0
    return mask


def our_output(config, params, tokens, mask=None):
    return jax.jit(Decoder(config).apply)({"params": params}, tokens, mask)


def their_model(folder, attention):
    model, report = transformers.MiniMaxForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, output_loading_info=True
    )
    # The derived decay buffers are not exported; the port builds them when loading.
    missing = [name for name in report["missing_keys"] if not name.endswith(("slope_rate", "_decay"))]
    assert not missing and not report["unexpected_keys"]
    return model.eval()


def their_logits(model, tokens, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=mask, use_cache=False).logits.numpy()


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_export_runs_in_stock_transformers(pattern, tmp_path):
    config = ModelConfig(layer_pattern=PATTERNS[pattern], **SHAPES)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    noise = np.random.default_rng(5)  # scales that are not all one
    params = jax.tree.map(lambda p: p * noise.uniform(0.5, 1.5, p.shape).astype(np.float32), params)
    params["embed"]["embedding"] *= 50  # embeddings of size one
    save_huggingface(params, config, tmp_path / "export", naming="transformers")
    tokens, mask = random_tokens(), left_padding()
    want = our_output(config, params, tokens).logits
    want_padded = np.asarray(our_output(config, params, tokens, mask).logits)
    for attention in ("eager", "sdpa"):
        model = their_model(tmp_path / "export", attention)
        assert_close(their_logits(model, tokens), want)
        assert_close(their_logits(model, tokens, mask)[mask > 0], want_padded[mask > 0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(stock model of random weights, the folder of its save_pretrained)."""
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        num_experts_per_tok=2,
        num_local_experts=6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        bos_token_id=None,
        eos_token_id=None,
        layer_types=["linear_attention", "full_attention"] * 2,
        initializer_range=0.15,
        router_aux_loss_coef=0.05,
        full_attn_alpha_factor=1.2,
        linear_attn_alpha_factor=1.4,
        mlp_alpha_factor=1.6,
        mlp_beta_factor=0.7,
    )
    model = transformers.MiniMaxForCausalLM._from_config(config, attn_implementation="eager").eval()
    folder = tmp_path_factory.mktemp("peer") / "saved"
    model.save_pretrained(folder)
    return model, folder


def test_transformers_save_runs_here(saved):
    model, folder = saved
    config, params = load_params(folder)
    config = dataclasses.replace(config, dtype="float32")
    assert config.layer_pattern == ("lightning", "softmax") and config.rotary_dim == config.head_dim
    tokens, mask = random_tokens(), left_padding()
    assert_close(our_output(config, params, tokens).logits, their_logits(model, tokens))
    padded = np.asarray(our_output(config, params, tokens, mask).logits)
    assert_close(padded[mask > 0], their_logits(model, tokens, mask)[mask > 0])


def test_training_loss_and_gradients_equal_those_of_transformers(saved):
    model, folder = saved
    config, params = load_params(folder)
    config = dataclasses.replace(config, dtype="float32")
    tokens = random_tokens()

    @jax.jit
    def objective(params):
        output = Decoder(config).apply({"params": params}, tokens, logits=False)
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        entropy = chunked_cross_entropy(output.hidden, params["lm_head"]["kernel"], targets, chunk=128)
        return entropy.objective / entropy.count + config.router_aux_loss_coef * load_balancing_loss(output.router)[0]

    loss, gradients = jax.value_and_grad(objective)(params)
    ids = torch.tensor(tokens).long()
    model.zero_grad()
    theirs = model(ids, labels=ids, output_router_logits=True, use_cache=False).loss
    theirs.backward()
    np.testing.assert_allclose(loss, theirs.item(), rtol=1e-6)
    layers, blocks = model.model.layers, gradients["blocks"]
    pairs = {
        "embedding": (gradients["embed"]["embedding"], model.model.embed_tokens.weight),
        "head": (gradients["lm_head"]["kernel"], model.lm_head.weight),
        "lightning norm": (blocks["layer_0"]["attention"]["norm"][1].reshape(-1), layers[2].self_attn.norm.weight),
        "key": (blocks["layer_1"]["attention"]["key"][0].reshape(32, -1).T, layers[1].self_attn.k_proj.weight),
        "router": (blocks["layer_1"]["mlp"]["router"][1].T, layers[3].mlp.gate.weight),
        "down": (blocks["layer_0"]["mlp"]["down"][0].swapaxes(1, 2), layers[0].mlp.experts.down_proj),
    }
    for name, (ours, parameter) in pairs.items():
        want = parameter.grad.numpy()
        np.testing.assert_allclose(ours, want, rtol=0, atol=3e-5 * np.abs(want).max(), err_msg=name)
