"""Generation: the fixtures of the released function, properties of decoding, sampling against NumPy, infer.py."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import mmx_jax
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.export_hf import export_checkpoint
from mmx_jax.checkpoints.load import save_huggingface
from mmx_jax.cli import arguments, text_input
from mmx_jax.config import ModelConfig
from mmx_jax.convert.import_hf import import_checkpoint
from mmx_jax.data.chat_template import ChatError
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.inference import generate, sampling
from mmx_jax.inference.chat import Conversation
from mmx_jax.inference.complete import encode_prompts
from mmx_jax.inference.detokenize import TextStream, special_stops, stream_text
from mmx_jax.inference.generate import DECODE_STEPS, power_of_two, slot_bucket
from mmx_jax.inference.inputs import GenerationError, check_tokens, left_align, ragged
from mmx_jax.inference.sampling import SamplingError, SamplingParams
from mmx_jax.layers.softmax_attention import KeyValueCache
from mmx_jax.models.params import abstract_params
from tests.support.paths import FIXTURES, REPOSITORY
from tests.support.patience import HANG_SECONDS

FIXTURES = FIXTURES / "text"
CHUNK = 20  # of prefill; with it the tests on the fixtures share a compiled shape


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest value, as the tolerances of the fixtures are meant."""
    assert np.shape(got) == np.shape(want)
    error = np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))
    assert error < tolerance, error


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# -------------------------------------------------------------------------------- the released function


@pytest.fixture(scope="module", params=["tiny/hf", "tiny/orig", "tiny_bf16/orig"])
def fixture(request):
    """(model, oracle) as a user loads it."""
    folder = FIXTURES / request.param
    with np.load(folder.parent / "oracle.npz") as file:
        oracle = {name: file[name] for name in file.files if not name.startswith("grad")}
    return mmx_jax.from_pretrained(folder, dtype="float32"), oracle


def test_logits(fixture):
    model, oracle = fixture
    assert model.tokenizer is None
    logits = model.logits(oracle["plain_ids"])
    assert logits.dtype == np.float32
    assert_close(logits, oracle["plain_logits"])
    assert_close(model.logits(oracle["long_ids"]), oracle["long_logits_b256"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows(fixture, side):
    model, oracle = fixture
    mask = oracle[f"{side}pad_mask"]
    logits = model.logits(oracle[f"{side}pad_ids"], mask)
    assert_close(logits[mask == 1], oracle[f"{side}pad_logits"][mask == 1])


@pytest.mark.parametrize("lengths", [(1, 33), (15, 16), (17, 32)])
def test_logits_of_every_length(fixture, lengths):
    model, oracle = fixture
    tokens, mask = ragged([oracle[f"len{n}_ids"][0] for n in lengths])
    pad = ((0, 0), (0, 40 - tokens.shape[1]))
    logits = model.logits(np.pad(tokens, pad), np.pad(mask, pad))
    for row, n in enumerate(lengths):
        assert_close(logits[row, :n], oracle[f"len{n}_logits"][0])


@pytest.mark.parametrize("name", ["gen", "genpad"])
def test_greedy_tokens_and_step_logits(fixture, name):
    model, oracle = fixture
    tokens, mask = oracle[f"{name}_ids"], oracle.get(f"{name}_mask")
    np.testing.assert_array_equal(
        model.generate(tokens, mask, max_new_tokens=16, prefill_chunk=CHUNK), oracle[f"{name}_new"]
    )
    session = model.session(2, prefill_chunk=CHUNK)
    session.extend(tokens, mask, reserve=16)
    for step in range(16):
        assert_close(session.logits, oracle[f"{name}_step_logits"][:, step])
        np.testing.assert_array_equal(session.decode(1)[:, 0], oracle[f"{name}_new"][:, step])


def test_states_and_caches_behind_prefill(fixture):
    model, oracle = fixture
    session = model.session(2, prefill_chunk=CHUNK)
    session.extend(oracle["plain_ids"])
    layers = session.state.layers
    for i, kind in enumerate(model.config.layer_kinds):
        layer = jax.tree.map(lambda x: np.asarray(x[0]), layers[f"layer_{i}"])
        if kind == "lightning":
            assert_close(layer, oracle[f"plain_state_{i}"], 2e-5)
        else:
            assert isinstance(layer, KeyValueCache)
            assert_close(layer.key[:, :, :40], oracle[f"plain_k_{i}"])
            assert_close(layer.value[:, :, :40], oracle[f"plain_v_{i}"])


def test_long_prompt_in_chunks_equals_whole(fixture):
    model, oracle = fixture
    session = model.session(1, prefill_chunk=128)
    session.extend(oracle["long_ids"])  # 4 chunks of 128 and a rest of 88
    assert_close(session.logits, oracle["long_logits_b256"][:, -1])


# -------------------------------------------------------------------------------- a small model as text


CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    layer_pattern=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=8,
    max_position_embeddings=256,
    mlp_dim=32,
    num_experts=2,
    experts_per_token=1,
    pad_token_id=1,
    dtype="float32",
)
TEXT = "the quick brown fox jumps over the lazy dog, äöü and 日本語 too; "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with random weights, a tokenizer of byte level, and only lower-case words as output."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer.train([TEXT * 20], 300)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "norm"):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(size=leaf.shape, scale=0.3).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))
    plain = [i for i in range(300) if (t := tokenizer.decode([i])).isascii() and t.strip().islower()]
    head = params["lm_head"]["kernel"]
    head[np.setdiff1d(np.arange(300), plain)] = 0  # their logit is 0, and some other's is larger
    head[300:] = 100 * head[plain[0]]  # ids that no token has; often the largest logits of all
    save_huggingface(params, CONFIG, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def model(checkpoint):
    return mmx_jax.from_pretrained(checkpoint)


PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50, 51, 52], list(range(60, 80))]


@pytest.fixture(scope="module")
def alone(model):
    """Greedy continuations of each prompt by itself."""
    return [model.generate([prompt], max_new_tokens=12, prefill_chunk=16)[0] for prompt in PROMPTS]


def test_ragged_batch_equals_each_row_alone(model, alone):
    for tokens, mask in (ragged(PROMPTS), [x[:, ::-1] for x in ragged([p[::-1] for p in PROMPTS])]):
        np.testing.assert_array_equal(model.generate(tokens, mask, max_new_tokens=12, prefill_chunk=16), alone)


def test_padding_may_stand_between(model, alone):
    tokens, mask = np.full((1, 20), 319), np.zeros((1, 20), int)
    where = [1, 2, 5, 9, 10, 17, 18]
    tokens[0, where], mask[0, where] = PROMPTS[0], 1
    np.testing.assert_array_equal(model.generate(tokens, mask, max_new_tokens=12, prefill_chunk=16)[0], alone[0])


def test_prefill_then_decode_equals_forward(model, alone):
    session = model.session(1, prefill_chunk=16)
    session.extend([PROMPTS[2]], reserve=12)
    logits = []
    for _ in range(12):
        logits.append(session.logits[0])
        session.decode(1)
    whole = model.logits([PROMPTS[2] + alone[2].tolist()])[0]
    assert_close(logits, whole[len(PROMPTS[2]) - 1 : -1])


def test_ids_without_a_token_are_never_drawn(model, alone):
    """Of ids 300 to 319 the largest logit wins at many places; the tokenizer has 300 tokens."""
    session = model.session(1, prefill_chunk=16)
    session.extend([PROMPTS[2]], reserve=12)
    assert model.tokenizer.vocab_size == 300
    assert max(max(row) for row in alone) < 300
    whole = model.logits([PROMPTS[2] + alone[2].tolist()])[0]
    assert (whole.argmax(axis=-1) >= 300).any()


def slots_of(session):
    return max(leaf.shape[3] for leaf in jax.tree.leaves(session.state.layers))


def test_session_goes_on_where_it_stopped(model):
    """Chat: reading, writing and reading again leaves what reading all at once does; the state grows on the way."""
    session = model.session(1, prefill_chunk=16)
    session.extend([PROMPTS[0]])
    written = session.decode(5)[0].tolist()
    assert slots_of(session) == 64
    session.extend([3 * PROMPTS[2]])
    whole = model.session(1, prefill_chunk=16)
    whole.extend([PROMPTS[0] + written + 3 * PROMPTS[2]])
    assert session.lengths == whole.lengths == session.state.lengths == 72  # padding of a bucket takes no slot
    assert slots_of(session) == 128
    assert session.state.layers["layer_0"].shape == (1, 1, 2, 16, 16)  # of the lightning layer, at any length
    assert_close(session.logits, whole.logits)
    for ours, theirs in zip(session.decode(6), whole.decode(6), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_stop_tokens_pad_and_spare_the_other_rows(model, alone):
    tokens, mask = ragged(PROMPTS)
    stop = int(alone[0][3])
    ends = [list(row).index(stop) + 1 if stop in row else 12 for row in alone]
    assert min(ends) <= 4 < max(ends), "the case needs rows that end and rows that go on"
    got = model.generate(tokens, mask, max_new_tokens=12, prefill_chunk=16, stop_tokens=[stop])
    for row, end, want in zip(got, ends, alone, strict=True):
        np.testing.assert_array_equal(row[:end], want[:end])
        assert (row[end:] == CONFIG.pad_token_id).all()
    pieces = list(model.stream(tokens, mask, max_new_tokens=12, prefill_chunk=16, stop_tokens=[stop]))
    assert pieces[0].shape == (3, 1)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), got[:, : max(ends)])


def test_rows_that_ended_go_on_with_the_next_turn(model, alone):
    tokens, mask = ragged(PROMPTS)
    session = model.session(3, prefill_chunk=16, stop_tokens=[int(alone[0][3])])
    session.extend(tokens, mask)
    written = [row[row >= 0].tolist() for row in session.decode(12)]
    assert len(written[0]) <= 4 and max(map(len, written)) == 12
    turn = [[90, 91], [92], [93, 94, 95]]
    session.extend(*ragged(turn))
    whole = model.session(3, prefill_chunk=16)
    whole.extend(*ragged([sum(parts, []) for parts in zip(PROMPTS, written, turn, strict=True)]))
    np.testing.assert_array_equal(session.lengths, whole.lengths)
    assert_close(session.logits, whole.logits)
    assert not session.done.any()


def test_decoding_ends_when_all_rows_have(model, alone):
    session = model.session(1, stop_tokens=[int(alone[0][0])], prefill_chunk=16)
    session.extend([PROMPTS[0]], reserve=12)
    assert session.decode(12).shape == (1, 1)
    assert session.done.all()
    assert session.decode(12).shape == (1, 0)
    assert session.lengths == len(PROMPTS[0]) + 1  # the stop token was read, for the next turn


DRAW = dict(max_new_tokens=12, temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, prefill_chunk=16)


def test_other_lengths_and_turns_compile_nothing(model, alone):
    compiled = [function._cache_size() for function in (generate.prefill_piece, generate.decode)]
    for length in (1, 16, 17, 40):
        session = model.session(1, prefill_chunk=16)
        session.extend([[7] * length])
        session.decode(5)
        session.finish(0)
        session.extend([[8] * 3])
        session.decode(8)
    assert [function._cache_size() for function in (generate.prefill_piece, generate.decode)] == compiled


def test_seeds(model):
    tokens, mask = ragged(PROMPTS)
    settings = DRAW | dict(repetition_penalty=1.1)
    first = model.generate(tokens, mask, seed=7, **settings)
    np.testing.assert_array_equal(model.generate(tokens, mask, seed=7, **settings), first)
    np.testing.assert_array_equal(model.generate(tokens, mask, seed=[7, 8, 9], **settings), first)
    np.testing.assert_array_equal(np.concatenate(list(model.stream(tokens, mask, seed=7, **settings)), 1), first)
    np.testing.assert_array_equal(model.generate(tokens[1:2], mask[1:2], seed=8, **settings), first[1:2])
    assert (model.generate(tokens, mask, seed=8, **settings) != first).any()


def test_repetition_penalty_reads_prompt_and_continuation(model):
    new = model.generate([PROMPTS[0]], **DRAW, repetition_penalty=1e30)[0]
    assert len({*new.tolist(), *PROMPTS[0]}) == 12 + len(PROMPTS[0])  # nothing twice while enough logits are positive


def test_score_is_the_log_softmax_of_the_logits(model):
    tokens, mask = np.arange(40, 60)[None], np.ones((1, 20), int)
    for padding in (slice(0, 5), slice(15, 20), slice(7, 9)):
        mask[:] = 1
        mask[0, padding] = 0
        scores = model.score(tokens, mask, prefill_chunk=16)
        real, ids = mask == 1, tokens[mask == 1]
        want = log_softmax(model.logits(tokens, mask)[real][:-1])[np.arange(len(ids) - 1), ids[1:]]
        assert_close(scores[real][1:], want)
        assert scores[real][0] == 0 and (scores[~real] == 0).all()
    assert model.score([[5]]) == 0


def test_bfloat16(checkpoint, model):
    half = mmx_jax.from_pretrained(checkpoint, dtype="bfloat16")
    assert half.params["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert half.params["blocks"]["layer_0"]["mlp"]["router"].dtype == jnp.float32
    got, want = half.logits([PROMPTS[2]])[..., :300], model.logits([PROMPTS[2]])[..., :300]
    assert got.dtype == np.float32
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.1


def test_export_is_what_was_loaded(model, tmp_path):
    model.export(tmp_path / "out", naming="transformers")
    again = mmx_jax.from_pretrained(tmp_path / "out")
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.tokenizer.encode(TEXT) == model.tokenizer.encode(TEXT)


def test_on_a_mesh(checkpoint, alone):
    from mmx_jax.config import MeshConfig
    from mmx_jax.sharding import make_mesh

    model = mmx_jax.from_pretrained(checkpoint, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_array_equal(model.generate([PROMPTS[0]], max_new_tokens=12, prefill_chunk=16)[0], alone[0])


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        ([[[1, 2]]], None, r"\[B, T\]"),
        ([[1, 2], [3]], [[1, 1], [1]], "take no mask"),
        ([[1, 2], []], None, "row 1 of the tokens is empty"),
        ([[1, 2], [3.5]], None, "row 1 of the tokens has shape"),
        ([[1, 2], [2**40]], None, "token 1099511627776"),
        ([[1, 2], [3, 2**40, 5]], None, "token 1099511627776 at row 1, column 1"),
        ([1, [2, 3]], None, "row 0 of the tokens has shape"),
        ("the cat", None, r"not text: .*model.complete"),
        (["the cat", "a"], None, r"not text: .*tokenizer.encode"),
        (np.zeros((0, 4), int), None, "empty"),
        (np.zeros((2, 0), int), None, "empty"),
        ([[1.5]], None, "integers"),
        ([[1, 320]], None, "token 320 at row 0, column 1"),
        ([[-1]], None, "token -1"),
        ([[1, 2]], [[1]], "shape of tokens"),
        ([[1, 2]], [[1, 2]], "1 at tokens"),
    ],
)
def test_bad_tokens(tokens, mask, message):
    with pytest.raises(GenerationError, match=message):
        check_tokens(CONFIG, tokens, mask)


def test_one_row_and_rows_of_different_lengths(model, alone):
    np.testing.assert_array_equal(model.generate(PROMPTS, max_new_tokens=12, prefill_chunk=16), alone)
    np.testing.assert_array_equal(
        model.generate([np.array(prompt) for prompt in PROMPTS], max_new_tokens=12, prefill_chunk=16), alone
    )
    np.testing.assert_array_equal(model.generate(PROMPTS[0], max_new_tokens=12, prefill_chunk=16), alone[:1])
    tokens, mask = check_tokens(CONFIG, [[5, 6, 7], [8], [9, 10]])
    np.testing.assert_array_equal(tokens, [[5, 6, 7], [0, 0, 8], [0, 9, 10]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1], [0, 1, 1]])
    scores, logits = model.score(PROMPTS, prefill_chunk=16), model.logits(PROMPTS[:1] * 2 + PROMPTS[1:2])
    assert scores.shape == (3, 20) and logits.shape == (3, 7, 320)
    assert_close(scores[1, -3:], model.score(PROMPTS[1], prefill_chunk=16)[0])
    assert_close(logits[2, -3:], model.logits(PROMPTS[1])[0])


# -------------------------------------------------------------------------------- logits that are no numbers


def with_params(model, edit):
    """The model with a copy of the parameters that `edit` has changed."""
    params = jax.tree.map(np.array, model.params)
    edit(params)
    changed = type(model)(model.config, jax.device_put(params))
    changed.tokenizer = model.tokenizer
    return changed


def spoil_embedding(params):
    params["embed"]["embedding"][44, 3] = np.nan


def test_nan_weights_end_every_path_with_the_place_and_the_cause(model):
    """Of the prompts only the first holds token 44. Its chunk has NaN from its beginning: masks multiply by zero."""
    spoiled = with_params(model, spoil_embedding)
    cause = "NaN or infinity in embed/embedding: "
    settings = dict(max_new_tokens=12, prefill_chunk=16)
    with pytest.raises(GenerationError, match=rf"row 1 after 7 tokens .*{cause}"):
        spoiled.generate([PROMPTS[1], PROMPTS[0]], **settings)
    with pytest.raises(GenerationError, match=rf"row 0 after 7 tokens .*{cause}"):
        list(spoiled.stream(PROMPTS[0], **settings))
    with pytest.raises(GenerationError, match=rf"row 1, column [0-4] .*{cause}"):
        spoiled.logits([[PROMPTS[1][0]] * 7, PROMPTS[0]])
    with pytest.raises(GenerationError, match=rf"row 1, column 1[3-8] .*{cause}"):  # padded at the left
        spoiled.score([PROMPTS[2], PROMPTS[0]], prefill_chunk=16)
    session = spoiled.session(1, prefill_chunk=16)
    session.extend(PROMPTS[0])
    with pytest.raises(GenerationError, match=cause):
        session.logits  # noqa: B018
    for call in (session.decode, session.decode, lambda n: session.extend([[n]])):
        with pytest.raises(GenerationError, match=cause):
            call(3)
    np.testing.assert_array_equal(  # a row that never meets it is as before
        spoiled.generate([PROMPTS[1]], **settings), model.generate([PROMPTS[1]], **settings)
    )


def test_nan_in_the_middle_of_decoding(model, alone):
    """A token that was drawn leads to NaN, in a later step of the same dispatch."""
    row, index = next(
        (row, index)
        for row, prompt in enumerate(PROMPTS)
        for index in range(1, 11)
        if alone[row][index] not in [*alone[row][:index], *prompt]
    )
    drawn = int(alone[row][index])
    spoiled = with_params(model, lambda params: params["embed"]["embedding"].__setitem__(drawn, np.inf))
    with pytest.raises(GenerationError, match=rf"row 0 after {len(PROMPTS[row]) + index + 1} tokens"):
        spoiled.generate(PROMPTS[row], max_new_tokens=12, prefill_chunk=16)


def test_ids_that_are_never_drawn_may_hold_nan(model, alone):
    spoiled = with_params(model, lambda params: params["lm_head"]["kernel"].__setitem__(slice(300, None), np.nan))
    got = spoiled.generate(PROMPTS[0], max_new_tokens=12, prefill_chunk=16)
    np.testing.assert_array_equal(got[0], alone[0])


def test_overflow_of_finite_weights_is_told_apart(model):
    def enlarge(params):
        params["lm_head"]["kernel"][...] = 3e38

    large = with_params(model, enlarge)
    with pytest.raises(GenerationError, match="all weights are finite, so the computation overflowed in float32"):
        large.logits(PROMPTS[0])
    error = generate.not_finite_error(dataclasses.replace(CONFIG, dtype="bfloat16"), large.params, "row 0")
    assert "overflowed in bfloat16; try dtype float32" in str(error)


def test_perplexity_beyond_floats_is_no_infinity():
    lines = text_input.score_lines(-7210.0, 11, 30)
    assert lines[3] == "perplexity         e^721.0, more than a float holds"
    assert text_input.score_lines(-20.0, 11, 30)[3] == f"perplexity         {math.exp(2):.4f}"


def test_bad_requests(model):
    with pytest.raises(GenerationError, match="row 1 holds no token"):
        model.generate([[1, 2], [3, 4]], [[1, 1], [0, 0]])
    with pytest.raises(GenerationError, match="max_position_embeddings=256"):
        model.generate([[1] * 250], max_new_tokens=7)
    with pytest.raises(GenerationError, match="max_position_embeddings=256"):
        model.score([[1] * 257])
    with pytest.raises(GenerationError, match="max_new_tokens=0"):
        model.generate([[1]], max_new_tokens=0)
    with pytest.raises(GenerationError, match="stop token 320"):
        model.generate([[1]], stop_tokens=[320])
    with pytest.raises(GenerationError, match="extend before decode"):
        model.session(1).decode(1)
    with pytest.raises(ValueError, match="dtype='float16' is not one of float32, bfloat16"):
        mmx_jax.from_pretrained("anywhere", dtype="float16")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
    ],
)
def test_bad_sampling_settings_are_named(setting, value):
    with pytest.raises(SamplingError, match=f"{setting}="):
        SamplingParams(**{setting: value})


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, [1, 2, 3]])
def test_bad_seeds(seed):
    with pytest.raises(SamplingError, match="seed"):
        sampling.row_keys(seed, 2)


# -------------------------------------------------------------------------------- sampling against NumPy


LOGITS = np.random.default_rng(1).normal(size=(5, 33), scale=2).astype(np.float32)
LOGITS[:, 7] = LOGITS[:, 20]  # equals


def kept_by(keep, logits):
    """bool [B, V] of a filter, back in the order of the ids."""
    values, ids = sampling.sort_descending(jnp.asarray(logits))
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, np.asarray(ids), np.isfinite(np.asarray(keep(values))), axis=1)
    return kept


@pytest.mark.parametrize("k", [1, 5, 33, 100])
def test_top_k(k):
    kept = kept_by(lambda v: sampling.keep_top_k(v, k), LOGITS)
    for row, logits in zip(kept, LOGITS, strict=True):
        likeliest = sorted(range(33), key=lambda i: (-logits[i], i))[:k]
        assert set(np.flatnonzero(row)) == set(likeliest)


@pytest.mark.parametrize("p", [1e-30, 0.3, 0.9, 1.0])
def test_top_p(p):
    kept = kept_by(lambda v: sampling.keep_top_p(v, np.float32(p)), LOGITS)
    for row, logits in zip(kept, LOGITS.astype(np.float64), strict=True):
        probability = np.exp(log_softmax(logits))
        want, total = set(), 0.0
        for i in sorted(range(33), key=lambda i: (-logits[i], i)):
            if total < p - 1e-7:
                want.add(i)
            total += probability[i]
        assert set(np.flatnonzero(row)) == (want or {int(np.argmax(logits))})


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(min_p):
    kept = kept_by(lambda v: sampling.keep_min_p(v, np.float32(min_p)), LOGITS)
    probability = np.exp(log_softmax(LOGITS))
    np.testing.assert_array_equal(kept, probability >= min_p * probability.max(axis=1, keepdims=True) * (1 - 1e-6))


def test_penalty():
    seen = np.random.default_rng(2).random(LOGITS.shape) < 0.5
    want = np.where(seen & (LOGITS > 0), LOGITS / 1.3, np.where(seen, LOGITS * 1.3, LOGITS))
    np.testing.assert_allclose(sampling.penalize(LOGITS, seen, 1.3), want, rtol=1e-6)


def choose(logits, settings, *, seed=0, count=0, seen=None):
    logits = jnp.asarray(logits, jnp.float32)
    keys = sampling.row_keys(seed, len(logits))
    return np.asarray(sampling.choose(logits, keys, count, settings.sampler(), seen, logits.shape[1]))


def test_greedy_takes_the_lowest_id_among_equals():
    logits = np.zeros((2, 8))
    logits[0, [3, 5]] = 1
    np.testing.assert_array_equal(choose(logits, SamplingParams()), [3, 0])
    np.testing.assert_array_equal(choose(logits, SamplingParams(temperature=1.0, top_k=1)), [3, 0])
    np.testing.assert_array_equal(choose(logits[:1] + 1e-4 * np.arange(8), SamplingParams(temperature=1e-30)), [5])


def test_tokens_are_drawn_with_their_probability():
    rows, count = 20_000, 8
    logits = np.linspace(-1, 1.5, count)[::-1][np.argsort(np.arange(count) * 5 % 8)]
    settings = SamplingParams(temperature=0.7, top_k=6, top_p=0.9, min_p=0.08, repetition_penalty=1.2)
    seen = np.zeros((rows, count), bool)
    seen[:, [0, 4]] = True
    drawn = choose(np.tile(logits, (rows, 1)), settings, seed=5, count=3, seen=seen)

    changed = logits.copy()
    for i in (0, 4):
        changed[i] = changed[i] / 1.2 if changed[i] > 0 else changed[i] * 1.2
    order = np.argsort(-changed, kind="stable")[:6]
    probability = np.exp(changed[order] / 0.7) / np.exp(changed[order] / 0.7).sum()
    order = order[np.cumsum(probability) - probability < 0.9]
    probability = probability[: len(order)]
    order, probability = (x[probability >= 0.08 * probability[0]] for x in (order, probability))
    want = np.zeros(count)
    want[order] = probability / probability.sum()
    assert 2 <= len(order) < 6, "the filters must bite"
    got = np.bincount(drawn, minlength=count) / rows
    assert (got[want == 0] == 0).all()
    np.testing.assert_array_less(np.abs(got - want), 4.5 * np.sqrt(want * (1 - want) / rows) + 1e-12)
    plain = choose(np.tile(logits, (rows, 1)), SamplingParams(temperature=1.0), seed=5)
    want = np.exp(log_softmax(logits))
    np.testing.assert_array_less(
        np.abs(np.bincount(plain, minlength=count) / rows - want), 4.5 * np.sqrt(want * (1 - want) / rows)
    )


def test_draws_of_one_row_differ_from_step_to_step():
    logits = np.zeros((1, 64))
    assert len({int(choose(logits, SamplingParams(temperature=1.0), count=n)[0]) for n in range(8)}) > 4


# -------------------------------------------------------------------------------- buckets


def test_buckets_hold_and_are_few():
    for n in range(1, 5000):
        assert max(16, n) <= power_of_two(n) < max(17, 2 * n)
        assert n <= slot_bucket(n) <= n * 1.25 + 64
    assert len({power_of_two(n) for n in range(1, 4097)}) == 9
    assert len({slot_bucket(n) for n in range(1, 100_000)}) < 60


def test_left_align():
    tokens, mask = left_align(np.array([[9, 1, 9, 2], [3, 9, 9, 9]]), np.array([[0, 1, 0, 1], [1, 0, 0, 0]], bool))
    np.testing.assert_array_equal(tokens, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(mask, [[1, 1], [1, 0]])


# -------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


@pytest.mark.parametrize(
    ("text", "stops", "want", "stopped"),
    [
        ("the quick brown fox", (), "the quick brown fox", False),
        ("the quick brown fox", ("k bro",), "the quic", True),  # over a border of tokens
        ("the quick brown fox", ("fox!", "own f"), "the quick br", True),
        ("the quick", ("quick?",), "the quick", False),  # a beginning that does not end
        ("the the theme", ("them",), "the the ", True),  # a beginning that begins again
        ("日本語 äö", ("語",), "日本", True),
        ("日本語 äö", (), "日本語 äö", False),
    ],
)
def test_stop_strings(tokenizer, text, stops, want, stopped):
    stream = TextStream(tokenizer, stops)
    pieces = [stream.step(token) for token in tokenizer.encode(text)]
    pieces.append(stream.finish())
    assert ("".join(pieces), stream.stopped) == (want, stopped)


def test_text_is_whole_characters(tokenizer):
    ids = [tokenizer.token_to_id(t) for t in "æĹ¥"]  # the three bytes of 日, as byte-level BPE writes them
    stream = TextStream(tokenizer)
    assert [stream.step(i) for i in ids] == ["", "", "日"]
    assert stream.step(ids[0]) == "" and stream.finish() == "\ufffd"


def test_stop_string_ends_a_row_and_spares_the_other(model, tokenizer):
    tokens, mask = encode_prompts(tokenizer, ["the quick", "lazy dog and", "fox"])
    free = [
        "".join(tokenizer.decode([t]) for t in row)
        for row in model.generate(tokens, mask, max_new_tokens=24, prefill_chunk=16)
    ]
    stop = free[0][5:8]
    session = model.session(3, prefill_chunk=16)
    session.extend(tokens, mask, reserve=24)
    texts = ["", "", ""]
    for row, text in stream_text(session, session.stream(24), tokenizer, stop_tokens=(), stop_strings=[stop]):
        texts[row] += text
    assert texts == [text.split(stop)[0] for text in free]
    assert session.done[0] and session.lengths[0] < mask[0].sum() + 24
    with pytest.raises(GenerationError, match="prompt 2 of 2 is empty"):
        encode_prompts(tokenizer, ["a", ""])
    with pytest.raises(GenerationError, match=r"prompt 1 of 1 holds '\\udce9' at character 3"):
        encode_prompts(tokenizer, ["caf\udce9"])
    with_bos = Tokenizer(tokenizer.backend, tokenizer.config | {"bos_token": "<beginning_of_sentence>"})
    tokens, mask = encode_prompts(with_bos, ["", "a\0b"])  # NUL is a character like any other
    assert tokens[0].tolist() == [2, 0, 0] and mask[0].tolist() == [True, False, False]
    assert tokenizer.decode(tokens[1]) == "a\0b"


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("the quick<end_of_sentence>brown", "<end_of_sentence>", "the quick"),
        ("the quick<end_of_sentence>brown", "quick<end_of_sentence>b", "the "),
        ("the quick<end_of_sentence>brown", "quick<pad>", "the quickbrown"),
        ("the quick<pad><end_of_sentence>fox", "k<pad><end_of_sentence>", "the quic"),
        ("the quick<pad><pad>fox", "k<pad><end_of_sentence>", "the quickfox"),
    ],
)
def test_special_tokens_in_stop_strings(tokenizer, text, stop, want):
    stream = TextStream(tokenizer, [stop])
    pieces = [stream.step(token) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.finish()]) == want
    spelled = TextStream(tokenizer, [stop])  # the same text of ordinary tokens
    ids = tokenizer.encode(text, parse_special=False)
    assert "".join([*map(spelled.step, ids), spelled.finish()]) == text.split(stop)[0]


def test_complete_is_the_text_of_generate(model, tokenizer, alone):
    prompts = [tokenizer.decode(prompt) for prompt in PROMPTS]
    assert [tokenizer.encode(prompt) for prompt in prompts] == PROMPTS
    settings = dict(max_new_tokens=12, prefill_chunk=16)
    want = [tokenizer.decode(row) for row in alone]
    assert model.complete(prompts, **settings) == want
    assert model.complete(prompts[1], **settings) == want[1]
    assert model.complete([], **settings) == []
    assert model.complete(prompts[0], stop=[want[0][4:6]], **settings) == want[0].split(want[0][4:6])[0]
    assert model.complete(prompts[0], stop_tokens=[int(alone[0][3])], **settings) == tokenizer.decode(alone[0][:3])
    draw = dict(temperature=1.3, seed=3, top_k=20)
    drawn = model.generate(PROMPTS, **draw, stop_tokens=model.stop_ids, **settings)
    assert model.complete(prompts, **draw, **settings) == [tokenizer.decode(row) for row in drawn]


def test_special_token_as_stop_string_ends_the_row_on_the_device(model, tokenizer, alone):
    """A tokenizer to which an ordinary token of the greedy text is special."""
    stop = int(alone[0][3])
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    name = tokenizer.backend.id_to_token(stop)
    backend.add_special_tokens([name])
    special = with_params(model, lambda params: None)
    special.tokenizer = Tokenizer(backend, tokenizer.config)
    assert backend.token_to_id(name) == stop and special_stops(special.tokenizer, [name + "\n"]) == {stop}
    prompt = tokenizer.decode(PROMPTS[0])
    got = special.complete(prompt, max_new_tokens=12, stop=[name], prefill_chunk=16)
    end = alone[0].tolist().index(stop)
    assert got == tokenizer.decode(alone[0][:end])


def test_complete_refuses(model):
    with pytest.raises(GenerationError, match="prompt 1 of 1 must be text, got list"):
        model.complete([[1, 2]])
    with pytest.raises(GenerationError, match="max_new_tokens=0"):
        model.complete("a", max_new_tokens=0)
    with pytest.raises(GenerationError, match=r"give \['x'\]"):
        model.complete("a", stop="x")
    with pytest.raises(GenerationError, match="a stop string is empty"):
        model.complete("a", stop=[""])
    with pytest.raises(GenerationError, match="no tokenizer"):
        type(model)(model.config, model.params).complete("a")


def test_repr_tells_what_a_model_and_a_session_are(model):
    count = sum(x.size for x in jax.tree.leaves(model.params))
    for part in ("2 layers (1 lightning, 1 softmax)", f"{count:,} parameters", "float32", "CPU", "300 tokens"):
        assert part.lower() in repr(model).lower()
    assert "no tokenizer" in repr(type(model)(model.config, model.params))
    assert repr(model.session(2)) == "Session(batch=2, lengths=[0, 0], done=0, slots=0, dtype=float32)"


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [(None, None, {0, 3}), (9, None, {0, 3, 9}), ([9, 10], [11, 9], {0, 3, 9, 10, 11}), (None, 7, {0, 3, 7})],
)
def test_texts_end_at_every_token_that_the_files_name(checkpoint, tmp_path, config, generation, want):
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": config}))
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    import_checkpoint(tmp_path / "model", tmp_path / "ours")
    for name in ("model", "ours"):
        assert set(mmx_jax.from_pretrained(tmp_path / name).stop_ids) == want


def token_ids(folder):
    """(eos, pad) of config.json, and the whole of generation_config.json."""
    config = json.loads((folder / "config.json").read_text())
    return config["eos_token_id"], config["pad_token_id"], json.loads((folder / "generation_config.json").read_text())


def test_export_states_what_ends_a_text(checkpoint, tmp_path):
    """The config names no eos; the tokenizer has one, and an end of a chat turn."""
    import_checkpoint(checkpoint, tmp_path / "ours")
    assert "cannot" not in export_checkpoint(tmp_path / "ours", tmp_path / "out")
    for folder in (checkpoint, tmp_path / "out"):
        assert token_ids(folder) == (0, 1, {"eos_token_id": [0, 3], "pad_token_id": 1})


@pytest.mark.parametrize("text", [None, '{ "eos_token_id":[10,9], "top_p":0.5 }', '{"eos_token_id": 4, "top_p": 0.5}'])
def test_no_eos_of_a_list_is_lost(checkpoint, tmp_path, text):
    source, file = tmp_path / "model", tmp_path / "model/generation_config.json"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [9, 10]}
    (source / "config.json").write_text(json.dumps(config))
    file.unlink() if text is None else file.write_text(text)
    import_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    eos, pad, generation = token_ids(tmp_path / "out")
    assert (eos, pad) == (9, 1)
    assert set(generation["eos_token_id"]) >= {9, 10} | ({4} if text and "4" in text else set())
    assert text is None or generation["top_p"] == 0.5
    if text and "10" in text:  # it names them all: not a byte is changed
        assert (tmp_path / "out/generation_config.json").read_text() == text


def test_export_tells_that_it_could_not_ask_the_tokenizer(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("no JSON")
    report = save_huggingface(model.params, model.config, tmp_path / "out", tokenizer_dir=tmp_path)
    assert "ids of special tokens are those of the config alone" in report and "tokenizer.json" in report
    (tmp_path / "tokenizer.json").unlink()
    other = Tokenizer.train([TEXT], 300)
    other.backend.add_tokens([f"<extra {i}>" for i in range(80)])  # more tokens than the model's 320
    other.config["pad_token"] = other.backend.id_to_token(325)
    other.save(tmp_path)
    with pytest.raises(ConversionError, match="special token 325 of the tokenizer is outside the model's vocabulary"):
        save_huggingface(model.params, model.config, tmp_path / "again", tokenizer_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a JSON list"),
        ("{", "not JSON"),
        ('{"eos_token_id": "2"}', "eos_token_id='2'"),
        ('{"eos_token_id": [1, null]}', "list of token ids"),
        ('{"eos_token_id": 320}', "320 .* outside"),
        ('{"pad_token_id": [1, 2]}', "pad_token_id"),
        ('{"eos_token_id": true}', "eos_token_id=True"),
    ],
)
def test_malformed_generation_config(checkpoint, tmp_path, text, message):
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(text)
    for call in (mmx_jax.from_pretrained, lambda path: import_checkpoint(path, tmp_path / "ours")):
        with pytest.raises(ConversionError, match=message) as caught:
            call(tmp_path / "model")
        assert "generation_config.json" in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_chat_reads_only_what_is_new(model, tokenizer):
    settings = dict(template="text01", max_new_tokens=6, prefill_chunk=16, stop_tokens=tokenizer.stop_ids)
    chat = Conversation(model, **settings)
    first = "".join(chat.reply("the quick"))
    session, before = chat.session, int(chat.session.lengths[0])
    messages = [{"role": "user", "content": "the quick"}]
    assert before == len(tokenizer.encode(tokenizer.apply_chat(messages, "text01"))) + 6
    second = "".join(chat.reply("lazy dog"))
    assert chat.session is session
    new = "<end_of_sentence>\n<beginning_of_sentence>user name=user\nlazy dog<end_of_sentence>\n"
    new += "<beginning_of_sentence>ai name=assistant\n"
    assert session.lengths[0] == before + len(tokenizer.encode(new)) + 6
    assert [m["content"] for m in chat.messages] == ["the quick", first, "lazy dog", second]

    # A fresh reading of the same text: the same tokens, so the same reply.
    session = model.session(1, prefill_chunk=16)
    history = tokenizer.encode(tokenizer.apply_chat(messages, "text01"))
    history += model.generate([history], max_new_tokens=6, prefill_chunk=16)[0].tolist() + tokenizer.encode(new)
    assert tokenizer.decode(model.generate([history], max_new_tokens=6, prefill_chunk=16)[0]) == second


def test_chat_reads_again_what_was_cut(model, tokenizer):
    chat = Conversation(model, template="text01", max_new_tokens=6, prefill_chunk=16, stop_tokens=())
    answer = "".join(chat.reply("the quick"))
    cut = Conversation(
        model, template="text01", max_new_tokens=6, prefill_chunk=16, stop_tokens=(), stop_strings=[answer[1:3]]
    )
    assert "".join(cut.reply("the quick")) == answer.split(answer[1:3])[0]
    session = cut.session
    list(cut.reply("lazy dog"))
    assert cut.session is not session  # the state holds text that the reader never saw
    with pytest.raises(GenerationError, match="max_position_embeddings"):
        chat.reply("dog " * 200)
    assert len(chat.messages) == 2
    list(chat.reply("the"))  # goes on after the refusal


def test_system_message_of_a_conversation(model, tokenizer):
    settings = dict(max_new_tokens=3, prefill_chunk=16, stop_tokens=())
    chat = Conversation(model, template="text01", system="be brief", **settings)
    list(chat.reply("the quick"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick"}]
    assert chat.messages[:2] == messages
    assert chat.session.lengths[0] == len(tokenizer.encode(tokenizer.apply_chat(messages, "text01"))) + 3
    deaf = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ChatError, match="leaves the system message out"):
        Conversation(model, template=deaf, system="be brief", **settings)
    strict = "{{ raise_exception('no system here') if messages[0].role == 'system' else 'x' }}"
    with pytest.raises(ChatError, match="no system here"):
        Conversation(model, template=strict, system="be brief", **settings)
    with pytest.raises(GenerationError, match="the turn holds"):
        chat.reply("caf\udce9")


# -------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--prompt=abc\udcff"], "--prompt is not UTF-8 text: it holds the byte 0xff"),
        (["x", "--chat", "--system", "caf\udce9"], "--system is not UTF-8 text: it holds the byte 0xe9"),
        (["x", "--stop=a", "b\udc80"], "argument 2 is not UTF-8 text"),
        (["x", "--\udcff=a"], "argument 1 is not"),
        (["x", "--prompt=\ud800"], "U\\+D800"),
    ],
)
def test_arguments_that_are_no_text(argv, message):
    with pytest.raises(arguments.UsageError, match=message):
        arguments.check_text(argv)
    arguments.check_text(["x", "--prompt=日本", "--stop", "é"])


@pytest.mark.parametrize("main", ["infer.py", "train.py"])
def test_mains_refuse_bytes_in_one_line(main):
    command = [sys.executable, main, b"--config=caf\xe9"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=HANG_SECONDS)
    assert done.returncode == 1
    want = f"{main}: --config is not UTF-8 text: it holds the byte 0xe9; give text in UTF-8\n"
    assert done.stderr.decode() == want


def test_text_from_files_and_standard_input(tmp_path, capsys):
    file = tmp_path / "prompt"
    file.write_bytes("\ufeffthe é\0".encode())
    assert text_input.read_text(str(file)) == "the é\0"
    for data, message in ((b"caf\xe9 x", "at byte 3"), ("the".encode("utf-16"), "UTF-16")):
        file.write_bytes(data)
        with pytest.raises(arguments.UsageError, match=f"prompt is not UTF-8 text: .*{message}"):
            text_input.read_text(str(file))
    told = []
    assert list(text_input.turns(io.BytesIO("\ufeffthe\r\n \n日\n".encode()), told.append)) == ["the", "日"]
    turns = text_input.turns(io.BytesIO(b"the\n\xe9\nfox\n"), told.append)
    assert next(turns) == "the"
    with pytest.raises(arguments.UsageError, match="line 2 of standard input is not UTF-8"):
        next(turns)
    terminal = io.BytesIO(b"\xe9\nfox\n")
    terminal.isatty = lambda: True
    assert list(text_input.turns(terminal, told.append)) == ["fox"]
    assert "line 1 of standard input" in told[1] and capsys.readouterr().err


def infer(*arguments, **kwargs):
    command = [sys.executable, "infer.py", *map(str, arguments)]
    options = dict(cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=HANG_SECONDS)
    return subprocess.run(command, **options, **kwargs)


def test_infer_completes(checkpoint, model, tokenizer):
    done = infer(f"--checkpoint={checkpoint}", "--prompt=the quick", "--max_new_tokens=10")
    assert done.returncode == 0, done.stderr
    tokens, mask = encode_prompts(tokenizer, ["the quick"])
    assert done.stdout == tokenizer.decode(model.generate(tokens, mask, max_new_tokens=10)[0]) + "\n"
    assert "prefill:" in done.stderr and "tokens/s" in done.stderr


def test_infer_scores(checkpoint, model, tokenizer, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    done = infer(f"--checkpoint={checkpoint}", f"--score={tmp_path / 'text'}", "--prefill_chunk=16")
    assert done.returncode == 0, done.stderr
    ids = tokenizer.encode(TEXT)
    total = log_softmax(model.logits([ids])[0])[np.arange(len(ids) - 1), ids[1:]].sum()
    values = {line[:19].strip(): float(line[19:].split()[0]) for line in done.stdout.splitlines()}
    assert values["tokens"] == len(ids)
    assert values["mean nll"] == pytest.approx(-total / (len(ids) - 1), abs=1e-3)
    assert values["perplexity"] == pytest.approx(math.exp(-total / (len(ids) - 1)), rel=1e-3)
    assert values["bits per byte"] == pytest.approx(-total / math.log(2) / len(TEXT.encode()), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--chat"], "give one of --prompt, --prompt_file, --chat and --score; got --prompt and --chat"),
        ([], "got none of them"),
        (["--prompt_file=/nowhere"], "/nowhere: no such file"),
        (["--prompt=a"], "/nowhere: no such folder"),
        (["--prompt=a", "--num_samples=2"], "--temperature"),
    ],
)
def test_infer_refuses(arguments, message):
    done = infer("--checkpoint=/nowhere", *arguments)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_infer_chats_until_end_of_file(checkpoint, model):
    turns = "the quick\n\nlazy dog\n"  # an empty line is no turn
    flags = [f"--checkpoint={checkpoint}", "--chat", "--template=text01", "--max_new_tokens=6"]
    done = infer(*flags, input=turns)
    assert done.returncode == 0, done.stderr
    stops = tuple(sorted(model.tokenizer.stop_ids))
    talk = Conversation(model, template="text01", max_new_tokens=6, stop_tokens=stops)
    replies = ["".join(talk.reply(text)) for text in ("the quick", "lazy dog")]
    assert all(replies)
    assert done.stdout == "".join(reply + "\n" for reply in replies)
    speeds = [line for line in done.stderr.splitlines() if "prefill:" in line]
    assert len(speeds) == 2 and all("decode:" in line and "tokens/s" in line for line in speeds), done.stderr
    assert "compilation included" in speeds[0] and "compilation included" not in speeds[1]


def test_infer_chat_needs_a_template(checkpoint):
    """Neither the tokenizer nor a flag has one."""
    done = infer(f"--checkpoint={checkpoint}", "--chat", input="the quick\n")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "infer.py: this tokenizer has no chat template" in line and "text01" in line, line


def test_infer_needs_a_tokenizer():
    done = infer(f"--checkpoint={FIXTURES / 'tiny/hf'}", "--prompt=a")
    assert done.returncode == 1
    assert "holds no tokenizer.json" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_infer_reads_converted_checkpoints_and_names_damage(checkpoint, model, tokenizer, tmp_path):
    import_checkpoint(checkpoint, tmp_path / "ours")
    converted = mmx_jax.from_pretrained(tmp_path / "ours")
    assert converted.config == model.config
    assert converted.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(converted.params), strict=True):
        np.testing.assert_array_equal(a, b)
    chunk = max((p for p in (tmp_path / "ours/params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:100])
    done = infer(f"--checkpoint={tmp_path / 'ours'}", "--prompt=a")
    assert done.returncode == 1
    assert "cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_version_and_laziness():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert mmx_jax.__version__ == project["version"]
    code = "import mmx_jax.config, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    with pytest.raises(AttributeError, match="from_pretraned"):
        mmx_jax.from_pretraned  # noqa: B018
    assert DECODE_STEPS >= 8
