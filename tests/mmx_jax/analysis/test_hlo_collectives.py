"""Collectives of an optimized program, counted by hand on fake devices and in a program of XLA:TPU."""

import json

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmx_jax.analysis import hlo_collectives
from mmx_jax.config import MeshConfig
from mmx_jax.sharding import make_mesh
from tests.support import fake_devices


def counted_by_hand():
    """A loop of 3 with a sum of [4, 5] over 4 devices, one of 7 in it with a hop of [6] bfloat16, and a gather."""

    def on_device(x, y, z):
        def inner(y, _):
            return lax.ppermute(y, "data", [(0, 1), (1, 0)]) * 2, None

        def outer(carry, _):
            x, y = carry
            return (lax.psum(x, "data") * 0.1, lax.scan(inner, y, length=7)[0]), None

        x, y = lax.scan(outer, (x, y), length=3)[0]
        return x, y, lax.all_gather(z, "data")

    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        f = jax.shard_map(on_device, in_specs=P(), out_specs=(P(), P(), P()), check_vma=False)
        arrays = jnp.zeros((4, 5)), jnp.zeros(6, jnp.bfloat16), jnp.zeros((2, 2), jnp.int8)
        text = jax.jit(f).lower(*arrays).compile().as_text()
    return hlo_collectives.collectives(text)


def test_collectives_in_loops_count_once_per_iteration():
    found = fake_devices.answer_of(__name__, count=4)
    assert found["all-reduce"] == [3, 3 * 4 * 5 * 4]
    hops, size = found["collective-permute"]
    assert hops == 21 and size in (21 * 6 * 2, 21 * 6 * 4)  # the CPU may widen bfloat16
    assert found["all-gather"] == [1, 4 * 2 * 2]


# As XLA:TPU writes them, shortened: a loop whose first round was taken out of it, a sum of which a slice is kept, and a
# sum over the network between slices.
TPU_PROGRAM = """\
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %slice = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %at, %zero), dynamic_slice_sizes={16,8}
}

%condition (carry: (s32[], f32[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%body (carry: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %fusion = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gather = f32[64,8]{1,0:T(8,128)} all-gather(%fusion), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %carry = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%begin, %x)
  %loop = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%carry), condition=%condition, body=%body
  %send = (f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%y, %z), _xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_fusions_and_transfers_between_slices_of_a_tpu_program_are_recognized():
    scatter, gather, between = hlo_collectives.operations(TPU_PROGRAM)
    assert scatter == ("reduce-scatter", 4, 16 * 8 * 4, 64 * 8 * 4, "f32", "{{0,2},{1,3}}")
    assert gather == ("all-gather", 4, 64 * 8 * 4, 16 * 8 * 4, "f32", "mesh['a'=2,'b'=2] {'a'}")
    assert between == ("slices-all-reduce", 1, 4 * 8 * 4, 4 * 8 * 4, "f32", "")
    assert hlo_collectives.collectives(TPU_PROGRAM)["reduce-scatter"] == (4, 4 * 16 * 8 * 4)


if __name__ == "__main__":
    print(json.dumps(counted_by_hand()))
