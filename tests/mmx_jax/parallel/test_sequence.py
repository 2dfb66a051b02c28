"""Sequence parallelism: divided rows equal whole rows, and what moves, read off the compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from mmx_jax.config import Config, ConfigError, MeshConfig, RuntimeConfig
from mmx_jax.parallel import lasp, ring_attention
from mmx_jax.sharding import MESH_AXES, RULES, over_mesh, row_axis
from pallas_kernels import platform
from pallas_kernels.lightning_attention import default_implementation
from tests.support import fake_devices
from tests.support.sharded_model import config
from tests.support.sharded_sequence import BATCH, DIM, HEADS, KV_HEADS, LENGTH, LIGHTNING, MODELS, SOFTMAX

STATE = 4 * BATCH * HEADS * DIM * DIM  # bytes


@pytest.fixture(scope="module")
def report():
    """What tests/support/sharded_sequence.py found."""
    return fake_devices.answer_of("tests.support.sharded_sequence")


@pytest.mark.parametrize("case", LIGHTNING)
def test_lightning_attention_of_divided_rows(report, case):
    """Documents over borders, ending at borders, parts of padding; output, final state, gradients, initial state."""
    assert report["lightning"][case]["output"] < 1e-6
    assert report["lightning"][case]["gradients"] < 1e-6


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_lasp_plus_gathers_one_state_in_each_direction(report, devices):
    found = report["lightning"][f"gather {devices}"]["collectives"]
    with_numbers = STATE // DIM * (DIM + 2)  # two rows more tell where documents end
    assert found["all-gather"] == [devices * STATE, devices * with_numbers]
    assert set(found) == {"all-gather", "all-reduce"}
    # The loss, and the gradients of the final and of the initial state.
    assert found["all-reduce"] == [4, STATE, STATE]


def test_lasp_plus_moves_the_same_whatever_the_length(report):
    """Twice the tokens, packed, in a backward pass that recomputes: no state is sent again."""
    want = report["lightning"]["gather whole rows"]["collectives"]
    assert want["all-reduce"] == [4]  # the loss of this test
    assert report["lightning"]["longer, recomputed"] == want


def test_lasp_plus_gathers_one_state_of_each_layer(report):
    """The gradient of a whole model of two lightning layers, of packed rows; longer ones move no more."""
    model = config()
    heads, dim = model.num_heads, model.head_dim
    states = [f"f32[8,{BATCH},{heads},{rows},{dim}]" for rows in (dim, dim + 2)]
    others = []
    for length, found in report["layers"].items():
        assert sorted(kind for kind in found if kind in states) == sorted(2 * states), length
        others.append(sorted(kind for kind in found if kind.startswith("f32") and kind not in states))  # parameters
    assert all(kinds == others[0] for kinds in others)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_lasp_sends_states_to_neighbours(report, devices):
    found = report["lightning"][f"ring {devices}"]["collectives"]
    assert found["collective-permute"] == [4 * BATCH, STATE, STATE]  # and the number of a document
    assert "all-gather" not in found


@pytest.mark.parametrize("case", SOFTMAX)
def test_softmax_attention_of_divided_rows(report, case):
    assert report["softmax"][case]["output"] < 1e-6
    assert report["softmax"][case]["gradients"] < 2e-6


@pytest.mark.parametrize("devices", [4, 8])
def test_the_ring_moves_keys_and_values_alone(report, devices):
    found = report["softmax"][f"ring {devices}"]["collectives"]
    assert found.pop("all-reduce") == [4]  # the loss of this test
    ids = 4 * BATCH * LENGTH // devices
    keys, queries = ids * KV_HEADS * DIM, ids * HEADS * DIM
    forward, backward = [keys, keys, ids], [keys, keys, ids] + 2 * [keys, keys]  # the last hop is behind the loop
    # Half of q, k, v, ids and the output; then of its gradient, dq, dk and dv.
    traded = [queries // 2] * 4 + [keys // 2] * 4 + [ids // 2]
    assert found == {"collective-permute": sorted(forward + backward + traded)}


def test_gathered_keys_are_gathered_once_for_both_directions(report):
    found = report["softmax"]["gather 8"]["collectives"]
    ids = 4 * BATCH * LENGTH
    assert found["all-gather"] == [ids, *[ids * KV_HEADS * DIM] * 2]
    assert found["reduce-scatter"] == [ids * KV_HEADS * DIM // 8] * 2


def test_causal_work_is_even_and_what_cannot_meet_is_left_out(report):
    """8 parts on 4 devices: 28 pairs of different parts if one document fills the row, 12 if there are two."""
    assert report["visits"]["one"] == [7, 7, 7, 7]
    assert report["visits"]["one a part"] == [0, 0, 0, 0]
    assert sum(report["visits"]["two"]) == 12


@pytest.mark.parametrize("mesh", MODELS)
def test_model_of_divided_rows(report, mesh):
    """Packed rows through both kinds of layer: logits and gradients, with either method."""
    assert report["model"][mesh]["logits"] < 1e-5
    assert report["model"][mesh]["gradients"] < 1e-5


def test_prefill_of_divided_prompts(report):
    """Two pieces, of which the second enters with the state of the first; logits and state."""
    assert report["model"]["prefill"] < 1e-5


def test_loss_of_divided_rows_gathers_nothing(report):
    assert report["loss"]["error"] < 1e-6
    assert set(report["loss"]["collectives"]) == {"all-reduce"}  # of the sums and of the gradient of the head


def mesh_of(**sizes):
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES, axis_types=axis_types)
    return jax.sharding.use_abstract_mesh(mesh)


def test_lengths_that_do_not_divide_are_an_error():
    with pytest.raises(ConfigError, match=r"training.sequence_length=8192 does not divide over mesh.seq=3"):
        Config(mesh=MeshConfig(seq=3))
    with mesh_of(seq=4):
        with pytest.raises(ConfigError, match="rows of 10 tokens .* mesh.seq=4: make training.sequence_length"):
            row_axis(10)
        assert row_axis(8) == "seq"
        assert row_axis(1) is None  # decoding
    with mesh_of(data=4):
        assert row_axis(10) is None


def test_a_batch_goes_to_as_many_devices_as_divide_it():
    seen = {}

    def shape(x):
        seen["rows"] = x.shape
        return x

    x = jax.ShapeDtypeStruct((6, 8), jnp.float32)
    for sizes, rows in ((dict(data=2, fsdp=3, seq=2), (1, 4)), (dict(data=2, fsdp=4), (3, 8)), (dict(data=4), (6, 8))):
        with mesh_of(**sizes):
            jax.eval_shape(
                over_mesh(shape, [("batch", row_axis(8) and "length")], ("batch", row_axis(8) and "length")), x
            )
        assert seen["rows"] == rows


def test_kernels_are_divided_over_the_mesh():
    """The compiler would not divide them, so that outside of shard_map none is chosen."""
    chosen = []

    def choose(x, slopes):
        chosen.append(default_implementation(x, x, x, slopes, segmented=False, chunk_size=None))
        return x

    arguments = jax.ShapeDtypeStruct((4, 64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.float32)
    tokens = "batch", "length", "heads_act"
    with mesh_of(fsdp=2, tensor=2, seq=2), platform.target("tpu"):
        jax.eval_shape(choose, *arguments)
        jax.eval_shape(over_mesh(choose, [tokens, ("heads_act",)], tokens), *arguments)
    assert chosen == ["chunked_xla", "mosaic_tpu"]


def test_tokens_are_batch_and_length():
    assert RULES["tokens"] == (*RULES["batch"], RULES["length"])


def test_unknown_methods_are_an_error():
    with pytest.raises(ConfigError, match="sequence_lightning='all' is not one of 'gather', 'ring'"):
        RuntimeConfig(sequence_lightning="all")
    with pytest.raises(ValueError, match="method 'all' of sequence parallelism is not one of gather, ring"):
        ring_attention.RingSpec(method="all")


def test_kernels_for_whole_rows_refuse_divided_ones():
    x = jnp.zeros((1, 4, 2, 2))
    with pytest.raises(NotImplementedError, match="'cudnn' serves whole rows; .* mesh axis 'seq' .* 'blockwise' does"):
        ring_attention.softmax_attention(x, x, x, spec=ring_attention.RingSpec(implementation="cudnn"))


def test_whole_rows_need_no_mesh():
    x = jnp.ones((1, 4, 2))
    output, state = lasp.lightning_attention(x, x, x, jnp.ones(1), spec=lasp.LaspSpec(axis=None))
    assert output.shape == x.shape
    assert state is None
