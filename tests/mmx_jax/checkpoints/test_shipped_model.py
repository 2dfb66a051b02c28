"""The PyTorch class that is shipped with exports computes what this project computes (extra `parity`).

One forward pass here is the reference of each configuration: attention is causal, so that it holds for every shorter
prompt too. What has padding, a cache or a beam is then held against plain forward passes of the same class.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx_jax
from mmx_jax.checkpoints.load import _ArrayTensors, load_params, resolve, save_huggingface
from mmx_jax.config import ModelConfig
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import abstract_params
from mmx_jax.training.loss import chunked_cross_entropy, load_balancing_loss

torch = pytest.importorskip("torch", reason="needs the extra `parity`: make parity")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`: make parity")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the peer's own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VOCAB, LENGTH, BLOCK = 96, 70, 16
TOLERANCE = 1e-5
SHAPES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    rope_theta=1e4,
    max_position_embeddings=512,
    mlp_dim=24,
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
HYBRID = {"layer_pattern": ("lightning", "softmax")}
CONFIGS = {
    "hybrid": HYBRID,
    "prenorm": dict(
        layer_pattern=("softmax", "lightning", "lightning"),
        num_layers=3,
        num_heads=6,
        num_kv_heads=3,
        postnorm=False,
        rotary_dim=16,
    ),
    "dense": dict(
        layer_pattern=("lightning",), num_layers=2, num_experts=1, experts_per_token=1, lightning_norm_eps=1e-2
    ),
    "softmax": dict(layer_pattern=("softmax",), num_layers=2, num_experts=5, experts_per_token=3, rotary_dim=2),
}
NAMINGS = {"hybrid": "original", "prenorm": "transformers", "dense": "transformers", "softmax": "original"}


def config_of(**changes):
    return ModelConfig(**SHAPES | changes)


def random_params(config):
    """Weights that make every part of the model matter, and no two experts tie."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        if path[-1].key in ("scale", "norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        size = 1 if path[-1].key == "embedding" else 0.3
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies remote code before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", [folder, *sys.path])
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)
        yield


def load(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def case(request, tmp_path_factory):
    """(config, params, folder, the class in blocks of 16 tokens)."""
    return _case(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return _case("hybrid", tmp_path_factory)


_CASES = {}


def _case(name, tmp_path_factory):
    if name not in _CASES:
        config = config_of(**CONFIGS[name])
        params = random_params(config)
        folder = tmp_path_factory.mktemp("export") / name
        save_huggingface(params, config, folder, naming=NAMINGS[name])
        _CASES[name] = config, params, folder, load(folder, block_size=BLOCK)
    return _CASES[name]


def random_tokens(rows=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length))


def forward(model, tokens, mask=None, **settings):
    mask = None if mask is None else torch.tensor(np.asarray(mask))
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=mask, **settings)


def logits_of(model, tokens, mask=None, **settings):
    return forward(model, tokens, mask, **settings).logits.numpy()


def assert_close(got, want, tolerance=TOLERANCE):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def padded(rows, width, where):
    """(tokens, mask) of rows laid into `width` columns at `where(row length)`; padding has a token of its own."""
    tokens, mask = np.full((len(rows), width), VOCAB - 1), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        columns = where(len(row))
        tokens[i, columns], mask[i, columns] = row, 1
    return tokens, mask


WIDTH = 40
PLACES = {
    "left": lambda n: np.arange(WIDTH - n, WIDTH),
    "right": lambda n: np.arange(n),
    "between": lambda n: np.sort(np.random.default_rng(n).permutation(WIDTH)[:n]),
}


@pytest.fixture(scope="module")
def rows():
    tokens = random_tokens()
    return [tokens[0, :33], tokens[1, :7], tokens[0, 30:31]]


def test_logits_are_those_of_this_project(case):
    config, params, _, model = case
    tokens = random_tokens()
    want = jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens, jnp.int32)).logits
    for length in (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, LENGTH):
        assert_close(logits_of(model, tokens[:, :length]), want[:, :length])


@pytest.mark.parametrize("place", sorted(PLACES))
def test_padding_changes_no_other_token(case, rows, place):
    model = case[-1]
    tokens, mask = padded(rows, WIDTH, PLACES[place])
    got = logits_of(model, tokens, mask)
    assert np.isfinite(got).all()
    for i, row in enumerate(rows):
        assert_close(got[i, mask[i] > 0], logits_of(model, row[None])[0])


@pytest.mark.parametrize("place", ["none", *sorted(PLACES)])
@pytest.mark.parametrize("whole_mask", [True, False])
def test_pieces_with_a_cache_are_the_whole(case, rows, place, whole_mask):
    model = case[-1]
    if place == "none":
        tokens, mask = random_tokens(length=WIDTH), None
    else:
        tokens, mask = padded(rows, WIDTH, PLACES[place])
    want = logits_of(model, tokens, mask)
    out, cache = [], None
    for start, stop in ((0, 5), (5, 22), (22, 23), (23, 24), (24, WIDTH)):
        part = None if mask is None else mask[:, (0 if whole_mask else start) : stop]
        got = forward(model, tokens[:, start:stop], part, past_key_values=cache, use_cache=True)
        cache = got[model_cache_name()]
        out.append(got.logits.numpy())
    real = slice(None) if mask is None else mask > 0
    assert_close(np.concatenate(out, axis=1)[real], want[real])


def model_cache_name():
    fields = {field.name for field in dataclasses.fields(transformers.modeling_outputs.MoeCausalLMOutputWithPast)}
    return "cache" if "cache" in fields else "past_key_values"


def greedy(model, row, count):
    """By a forward pass over the whole text for every token."""
    for _ in range(count):
        row = np.append(row, logits_of(model, row[None], use_cache=False)[0, -1].argmax())
    return row[-count:]


def generate(model, tokens, mask=None, count=12, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, **settings}
    mask = np.ones_like(tokens) if mask is None else mask
    out = model.generate(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(mask), max_new_tokens=count, **settings
    )
    return out[:, tokens.shape[1] :].numpy()


def test_generate_is_greedy_in_a_ragged_batch(case, rows):
    config, _, folder, model = case
    want = [greedy(model, row, 12) for row in rows]
    tokens, mask = padded(rows, WIDTH, PLACES["left"])
    np.testing.assert_array_equal(generate(model, tokens, mask), want)
    np.testing.assert_array_equal(generate(model, tokens, mask, prefill_chunk_size=13), want)
    np.testing.assert_array_equal(generate(model, tokens, mask, use_cache=False, count=3), [row[:3] for row in want])


def test_generate_is_that_of_this_project(hybrid, rows):
    _, _, folder, model = hybrid
    tokens, mask = padded(rows, WIDTH, PLACES["left"])
    want = mmx_jax.from_pretrained(folder).generate(tokens, mask, max_new_tokens=12)
    np.testing.assert_array_equal(generate(model, tokens, mask), want)


def test_beams_take_their_states_along(hybrid, rows):
    model = hybrid[-1]
    tokens, mask = padded(rows[:2], WIDTH, PLACES["left"])
    settings = {"num_beams": 3, "num_return_sequences": 2, "count": 8}
    cached = generate(model, tokens, mask, **settings)
    np.testing.assert_array_equal(cached, generate(model, tokens, mask, use_cache=False, **settings))
    assert len(np.unique(cached, axis=0)) > 2


def test_a_sampled_conversation_goes_on_from_its_cache(hybrid):
    model = hybrid[-1]
    torch.manual_seed(0)
    tokens = torch.tensor(random_tokens(rows=2, length=9)).long()
    name = model_cache_name()
    first = model.generate(tokens, do_sample=True, max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0)
    turn = torch.cat([first.sequences, tokens[:, :4]], dim=1)
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    again = model.generate(turn, **{name: first[name]}, **settings)
    np.testing.assert_array_equal(again.numpy(), model.generate(turn, **settings).numpy())


def test_a_cache_that_cannot_hold_the_states_is_refused(hybrid):
    model = hybrid[-1]
    with pytest.raises(ValueError, match="cannot hold lightning states"):
        forward(model, random_tokens(length=4), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="packed"):
        forward(model, random_tokens(rows=1, length=4), position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        forward(model, random_tokens(length=4), np.ones((2, 3), int))


def test_loss_and_gradients_are_those_of_this_project(hybrid):
    config, params, folder, _ = hybrid
    tokens = random_tokens(length=40)

    @jax.jit
    def objective(params):
        output = Decoder(config).apply({"params": params}, jnp.asarray(tokens, jnp.int32), logits=False)
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        entropy = chunked_cross_entropy(output.hidden, params["lm_head"]["kernel"], targets, chunk=128)
        return entropy.objective / entropy.count + config.router_aux_loss_coef * load_balancing_loss(output.router)[0]

    loss, gradients = jax.value_and_grad(objective)(params)
    want = _ArrayTensors(gradients, config)
    model, ids = load(folder, block_size=BLOCK).train(), torch.tensor(tokens).long()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        theirs = model(ids, labels=ids, output_router_logits=True).loss
        theirs.backward()
        np.testing.assert_allclose(loss, theirs.item(), rtol=1e-6)
        named = dict(model.named_parameters())
        assert set(named) == {mapping.hf for mapping in want.mappings}
        for mapping in want.mappings:
            gradient = want.read(mapping)
            atol = 3e-5 * np.abs(gradient).max()
            np.testing.assert_allclose(named[mapping.hf].grad, gradient, rtol=0, atol=atol, err_msg=mapping.hf)


def test_bfloat16_keeps_router_states_and_logits_in_float32(tmp_path):
    config = config_of(**HYBRID, experts_per_token=4)  # all of them: rounding decides no choice
    save_huggingface(random_params(config), config, tmp_path / "out")
    exact, model = load(tmp_path / "out"), load(tmp_path / "out", dtype=torch.bfloat16)
    floats = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert floats == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(4)}
    tokens = random_tokens()
    got = forward(model, tokens, use_cache=True)
    cache = got[model_cache_name()]
    assert got.logits.dtype == torch.float32 and cache.get_state(0).dtype == torch.float32
    assert cache.entries[1][0].dtype == torch.bfloat16
    want = logits_of(exact, tokens)
    error = got.logits.numpy() - want
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert forward(exact, tokens).router_logits is None
        assert np.isfinite(logits_of(exact, tokens)).all()


def test_saved_weights_load_again_there_and_here(case, tmp_path):
    config, params, _, model = case
    model.save_pretrained(tmp_path / "saved")
    tokens = random_tokens()
    assert_close(logits_of(load(tmp_path / "saved"), tokens), logits_of(model, tokens))
    loaded_config, loaded = load_params(tmp_path / "saved")
    assert dataclasses.replace(loaded_config, dtype=config.dtype) == config  # dtype is in no file of theirs
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_missing_key_is_an_error_there_too(hybrid, tmp_path):
    folder = hybrid[2]
    keys = json.loads((folder / "config.json").read_text())
    config_class = type(hybrid[-1].config)
    for key in ("rotary_dim", "postnorm", "rope_theta", "layernorm_mlp_alpha", "attn_type_list"):
        with pytest.raises(ValueError, match=key):
            config_class(**{name: value for name, value in keys.items() if name != key})


STOCK = dict(layer_pattern=("softmax", "lightning", "lightning", "softmax"), rotary_dim=16)


def test_the_stock_class_is_named_where_it_is_exact(tmp_path):
    config = config_of(**STOCK)
    params = random_params(config)
    report = save_huggingface(params, config, tmp_path / "export", naming="transformers")
    assert "WARNING" not in report
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert type(stock) is transformers.MiniMaxForCausalLM and stock.dtype == torch.float32
    own = load(tmp_path / "export")
    assert type(own).__name__ == "MiniMaxText01ForCausalLM" and own.config.model_type == "minimax_text_01"
    tokens = random_tokens(length=300)  # more than one of its blocks of 256
    assert_close(logits_of(stock, tokens, use_cache=False), logits_of(own, tokens))
    np.testing.assert_array_equal(generate(stock, tokens), generate(own, tokens))


SCRIPT = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model.dtype, model(torch.arange(5)[None]).logits.sum().item())
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("trust_remote_code=True" in str(error))
"""


def test_a_fresh_process_loads_the_folder_alone(hybrid, tmp_path):
    folder, model = hybrid[2:]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-2000:]
    first, second = process.stdout.splitlines()
    name, dtype, total = first.split()
    assert (name, dtype, second) == ("MiniMaxText01ForCausalLM", "torch.float32", "True")
    np.testing.assert_allclose(float(total), logits_of(model, np.arange(5)[None]).sum(), rtol=1e-3)


def test_the_folder_is_resolved_as_the_model_it_was(case):
    config, _, folder, _ = case
    assert resolve(folder).config.lightning_norm_eps == config.lightning_norm_eps
