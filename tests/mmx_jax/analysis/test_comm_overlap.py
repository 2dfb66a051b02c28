"""Transfers that overlap with products, in a schedule written by hand and in one of the TPU compiler."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from mmx_jax.analysis import aot
from mmx_jax.analysis.comm_overlap import overlap
from mmx_jax.config import MeshConfig, ModelConfig, RuntimeConfig
from mmx_jax.layers.moe import MixtureOfExperts
from mmx_jax.sharding import logical_to_spec, make_mesh
from pallas_kernels import platform
from tests.support import ahead_of_time

# Three asynchronous transfers and a synchronous one. Between start and end run a fusion with a product, an addition,
# and a product; the last of the three fills a buffer that is larger than its operand.
SCHEDULE = """HloModule step, is_scheduled=true

%multiplying (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %all-to-all-start.1 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-to-all-start(%x), replica_groups={}
  %f = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%multiplying
  %all-to-all-done.1 = bf16[8,8]{1,0} all-to-all-done(%all-to-all-start.1)
  %all-to-all-start.2 = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) all-to-all-start(%f), replica_groups={}
  %a = bf16[8,8]{1,0} add(%x, %f)
  %all-to-all-done.2 = bf16[8,16]{1,0} all-to-all-done(%all-to-all-start.2)
  %b = bf16[8,8]{1,0} all-to-all(%a), replica_groups={}
  %ragged-all-to-all-start.3 = ((bf16[8,8], bf16[32,8], s32[4]), bf16[32,8], u32[]) ragged-all-to-all-start(%x, %y, %t)
  %d = bf16[8,8]{1,0} dot(%b, %b)
  ROOT %ragged-all-to-all-done.3 = bf16[32,8]{1,0} ragged-all-to-all-done(%ragged-all-to-all-start.3)
}
"""


def test_a_transfer_is_hidden_by_products_before_its_end():
    found = overlap(SCHEDULE)
    assert found == (4, 2 * (64 + 128 + 64 + 64), 2 * (128 + 64))
    assert found.exposed_fraction == 0.6
    assert overlap(SCHEDULE, kinds=("all-gather",)) == (0, 0, 0)


@pytest.mark.topology
def test_groups_of_tokens_travel_while_others_are_multiplied():
    """A recomputed layer on four chips: rows go to the experts and back, forward and backward."""
    exposed = ahead_of_time.answer_of(__name__, "v5e:2x2")
    assert [exposed[groups][0] for groups in ("1", "4")] == [4, 16]
    # Without groups, only products of the backward pass overlap. With four groups, only the first group is exposed.
    assert exposed["4"][1] <= 1 / 8 < exposed["1"][1] <= 1 / 2, exposed


def exposed_of(token_groups, topology):
    devices = aot.topology_devices(topology)
    mesh = make_mesh(MeshConfig(data=1, expert=len(devices)), devices)
    config = ModelConfig(
        vocab_size=512,
        hidden_size=2048,
        num_layers=1,
        layer_pattern=("softmax",),
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        rotary_dim=64,
        mlp_dim=2816,
        num_experts=8,
        experts_per_token=2,
        dtype="bfloat16",
        expert_buffer=2.0,
    )
    layer = MixtureOfExperts(config, RuntimeConfig(token_groups=token_groups))

    def placed(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, logical_to_spec(axes)))

    def gradients(params, x, d_output):
        layer_of = jax.checkpoint(lambda params, x: layer.apply({"params": params}, x, None)[0])
        return jax.vjp(layer_of, params, x)[1](d_output)

    x = placed((len(devices), 8192, config.hidden_size), jnp.bfloat16, ("batch", "length", None))
    with platform.target("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        boxed = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, None)["params"], x)
        params = {name: placed(box.value.shape, box.value.dtype, box.names) for name, box in boxed.items()}
        program = jax.jit(gradients).lower(params, x, x).compile(compiler_options=platform.compiler_options())
    found = overlap(program.as_text())
    return found.count, found.exposed_fraction


if __name__ == "__main__":
    print(json.dumps({groups: exposed_of(groups, sys.argv[1]) for groups in (1, 4)}))
