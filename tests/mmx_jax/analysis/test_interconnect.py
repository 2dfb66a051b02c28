"""Bytes over the links of a torus, against sums by hand, and against the links that every message takes."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mmx_jax.analysis import hlo_collectives, interconnect
from mmx_jax.analysis.hlo_collectives import Operation
from mmx_jax.analysis.interconnect import Load, Torus
from mmx_jax.config import MeshConfig
from mmx_jax.sharding import make_mesh
from tests.support import fake_devices

RING, LINE = Torus((4,), (True,)), Torus((4,), (False,))
CUBE = Torus((8, 8, 16), (True,) * 3)


def test_a_gather_brings_every_chip_what_it_has_not():
    assert RING.all_gather(400, (0,)) == 150  # 300 by two links
    assert LINE.all_gather(400, (0,)) == 300  # a chip at the end has one link
    assert CUBE.all_gather(6400, (0, 1)) == 1575  # 63 of 64 parts by four links
    assert CUBE.all_reduce(6400, (0, 1)) == 2 * 1575
    assert CUBE.all_gather(1600, (2,)) == 750


def test_an_all_to_all_is_bound_by_distance():
    assert RING.all_to_all(400, (0,)) == 200  # 100 each go 0, 1, 2 and 1 links far, by two links of a chip
    assert LINE.all_to_all(400, (0,)) == 400  # two chips send two chips 100 each through the middle
    assert CUBE.all_to_all(1600, (2,)) == 3200  # 4 links on average
    assert CUBE.all_to_all(1600, (0,)) == 1600
    assert CUBE.all_to_all(1600, (0, 2)) == 3200  # the longer axis


@pytest.mark.parametrize("sizes", [(4,), (5,), (4, 2), (3, 4)])
@pytest.mark.parametrize("closed", [True, False])
def test_an_all_to_all_loads_links_as_its_messages_one_by_one_do(sizes, closed):
    torus, places = Torus(sizes, (closed,) * len(sizes)), np.array(list(np.ndindex(sizes)))
    pairs = list(itertools.product(range(len(places)), repeat=2))
    want = torus.all_to_all(10.0 * len(places), range(len(sizes)))
    assert torus.permute(10.0, pairs, places) == pytest.approx(want)


def test_a_permutation_loads_the_links_on_its_way():
    places = np.arange(4)[:, None]
    around = [(i, (i + 1) % 4) for i in range(4)]
    assert RING.permute(7, around, places) == 7
    assert LINE.permute(7, around, places) == 7  # back from the end against the others
    assert RING.permute(8, [(0, 2)], places) == 4  # half each way
    assert RING.permute(8, [(0, 1), (0, 2)], places) == 12
    assert LINE.permute(8, [(0, 2), (1, 3)], places) == 16  # both cross the middle
    assert RING.permute(8, [(1, 1)], places) == 0


def test_v5p_is_closed_in_slices_of_whole_cubes():
    assert Torus.of_v5p((8, 8, 16)).closed == (True,) * 3
    assert Torus.of_v5p((2, 4, 4)).closed == (False,) * 3


def test_groups_are_read_in_every_form_that_xla_writes():
    rows = [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert interconnect.parse_groups("{{0,4},{1,5},{2,6},{3,7}}", 8) == rows
    assert interconnect.parse_groups("mesh['a'=2,'b'=4] {'a'}", 8) == rows
    assert interconnect.parse_groups("[4,2]<=[2,4]T(1,0)", 8) == rows
    assert interconnect.parse_groups("[2,4]<=[8]", 8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert interconnect.parse_groups("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", 8) == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert interconnect.parse_groups("{}", 3) == [(0, 1, 2)]
    with pytest.raises(ValueError, match="have an unknown form"):
        interconnect.parse_groups("mesh['a'=8] {'a':(2)4}", 8)


def test_groups_tell_axes_of_mesh_and_torus():
    shape = {"fsdp": 4, "expert": 2}
    assert interconnect.mesh_axes((0, 2, 4, 6), shape) == ("fsdp",)
    assert interconnect.mesh_axes((6, 7), shape) == ("expert",)
    assert interconnect.mesh_axes((0, 2), shape) == ()  # a part of an axis
    places = np.array(list(np.ndindex(2, 2, 2)))
    assert interconnect.torus_axes(places[[0, 2, 4, 6]], Torus((2, 2, 2), (False,) * 3)) == (0, 1)
    with pytest.raises(ValueError, match="not a product of axes of the torus"):
        interconnect.torus_axes(places[[0, 1, 2]], Torus((2, 2, 2), (False,) * 3))


def test_between_slices_bytes_go_round_a_ring_of_slices():
    summed = Operation("slices-all-reduce", 3, 100, 100, "f32", "")
    assert interconnect.dcn_bytes(summed, 2) == 100
    assert interconnect.dcn_bytes(summed, 4) == 150
    (load,) = interconnect.loads([summed], {"data": 1}, np.zeros((1, 3)), CUBE, slices=4)
    assert load == Load("slices-all-reduce", "f32", ("slices",), 3, 300, 450.0, ())


def test_a_ragged_exchange_is_what_was_sent_and_not_the_buffer():
    exchange = Operation("ragged-all-to-all", 2, 3200, 1600, "bf16", "{{0,1,2,3}}")
    (load,) = interconnect.loads([exchange], {"expert": 4}, np.arange(4)[:, None], RING)
    assert (load.bytes, load.link_bytes) == (6400, 2 * 800)


def counted():
    """[kind, axes, count, bytes, bytes over a link] of collectives over known axes, in a loop of 3 and outside."""

    def on_device(x):
        def step(x, _):
            return lax.psum(x, "fsdp") * 0.5, None

        x = lax.scan(step, x, length=3)[0]
        y = lax.all_gather(x, ("data", "tensor"))
        return lax.ppermute(y, "tensor", [(0, 1), (1, 0)])

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    with jax.set_mesh(mesh):
        f = jax.shard_map(on_device, in_specs=P(), out_specs=P(), check_vma=False)
        text = jax.jit(f).lower(jnp.zeros(16)).compile().as_text()
    torus = Torus((2, 2, 2), (False,) * 3)
    return interconnect.loads(
        hlo_collectives.operations(text), dict(mesh.shape), np.array(list(np.ndindex(2, 2, 2))), torus
    )


def test_collectives_of_a_compiled_program_run_over_the_axes_that_they_name():
    found = {(kind, tuple(axes)): rest for kind, _, axes, *rest in fake_devices.answer_of(__name__)}
    # [16] float32 of one of two chips by one link, thrice and both ways
    assert found["all-reduce", ("fsdp",)] == [3, 3 * 64, 3 * 64.0, [1]]
    assert found["all-gather", ("data", "tensor")] == [1, 4 * 64, 96.0, [0, 2]]
    assert found["collective-permute", ("tensor",)] == [1, 4 * 64, 256.0, [2]]


if __name__ == "__main__":
    print(json.dumps(counted()))
