"""Experts over the mesh: equal to one device, what is dropped, and what travels in the compiled programs."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ConfigError, MeshConfig, ModelConfig, RuntimeConfig
from mmx_jax.layers.moe import MixtureOfExperts
from mmx_jax.parallel.mesh_group import MeshGroup
from mmx_jax.sharding import MESH_AXES, logical_to_spec, make_mesh
from mmx_jax.training.batches import check_tokens
from pallas_kernels import platform
from tests.support import ahead_of_time, fake_devices
from tests.support.sharded_experts import CASES, EMBED, EXPERTS, INNER, MESHES, collectives


@pytest.fixture(scope="module")
def report():
    """What tests/support/sharded_experts.py found on 8 devices."""
    return fake_devices.answer_of("tests.support.sharded_experts")


cases = pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])


@cases
def test_sharded_equals_unsharded(report, case):
    """Output, sums of the router and all gradients, random and skewed, padded."""
    result, capacity_factor = report["equality"][case], CASES[case][3]
    assert max(result["errors"]) < 1e-5
    assert (result["dropped"] > 0) == (capacity_factor is not None)


@cases
def test_collectives_of_forward_and_backward(report, case):
    name, (rows, length), groups, capacity_factor = CASES[case]
    mesh, found = (
        dict.fromkeys(("fsdp", "expert", "expert_tensor", "tensor", "seq"), 1) | MESHES[name],
        report["equality"],
    )
    found = {kind: sorted(types) for kind, types in found[case]["collectives"].items()}
    owners, width = mesh["expert"] * mesh["tensor"], mesh["expert_tensor"]
    # Rows go to their experts and back, and their gradients the same way.
    assert len(found.get("all-to-all", ())) == (4 * groups if owners > 1 else 0)
    # Of weights only what fsdp and seq divide is gathered: the result is the experts of this device, or its slice.
    own, inner = EXPERTS // owners, INNER // width
    up, down = f"f32[{own},{EMBED},{inner}]", f"f32[{own},{inner},{EMBED}]"
    weights = [f"f32[{EMBED},{EXPERTS}]", up, up, down] if mesh["fsdp"] * mesh["seq"] > 1 else []
    # Rows are gathered over the slices of an expert before its products, and their gradients likewise.
    received = owners * (rows * length // 8 // groups) * min(2, own)
    travelling = [f"f32[{width * received},{EMBED}]"] * (2 * groups) if width > 1 else []
    gathers = found.get("all-gather", [])
    assert [t for t in gathers if t.startswith("f32")] == sorted(weights + travelling)
    tables = groups * (owners > 1) + groups * (width > 1) + (capacity_factor is not None)
    assert len(gathers) == len(weights) + len(travelling) + tables
    summed = [f"f32[{received},{EMBED}]"] * (2 * groups) if width > 1 else []
    assert len(found.get("reduce-scatter", [])) == len(summed) + len(weights)
    assert set(summed) <= set(found.get("reduce-scatter", []))


@cases
def test_gradients_of_weights_come_with_those_of_tokens(report, case):
    """All of them behind one barrier, so that no product is put off; they are summed over devices behind it."""
    mesh = dict.fromkeys(("expert", "expert_tensor", "tensor"), 1) | MESHES[CASES[case][0]]
    own, inner = EXPERTS // mesh["expert"] // mesh["tensor"], INNER // mesh["expert_tensor"]
    up, down = f"{own}x{EMBED}x{inner}xf32", f"{own}x{inner}x{EMBED}xf32"
    assert [up, up, down] in [barrier[1:] for barrier in report["equality"][case]["barriers"] if len(barrier) == 4]


def test_a_capacity_shared_by_all_devices_drops_less(report):
    """Tokens that want the same experts on a quarter of the devices."""
    dropped = report["scopes"]
    assert 0 < dropped["global"] < 0.7 * dropped["local"]


def test_a_full_buffer_drops_the_same_fraction_of_all(report):
    result = report["buffer"]
    assert result["error"] < 1e-5
    assert result["dropped"] == result["want_dropped"] > 0


def test_a_mesh_that_does_not_divide_the_experts_is_an_error(report):
    message = "axis 'experts' of size 4 does not divide over the 8 devices of mesh.expert=8 x mesh.tensor=1"
    assert message in report["errors"]["experts"]
    message = "axis 'mlp' of size 12 does not divide over the 8 devices of mesh.expert_tensor=8"
    assert message in report["errors"]["width"]


def test_a_mesh_that_does_not_divide_the_tokens_is_an_error():
    mesh = AbstractMesh((1, 1, 1, 1, 4, 2), MESH_AXES)
    check_tokens(2, mesh, 1, 16)
    message = "sequence_length: a row of size 20 does not divide over the 8 devices of mesh.seq=2 x mesh.tensor=4"
    with pytest.raises(ConfigError, match=message):
        check_tokens(1, mesh, 1, 20)
    with pytest.raises(ConfigError, match="token_groups=4 does not divide the 6 tokens of a device"):
        check_tokens(4, mesh, 3, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(expert_buffer=0.0), "expert_buffer=0.0 must be positive, or None"),
        (dict(capacity_scope="device"), "capacity_scope='device' is not one of 'global', 'local'"),
    ],
)
def test_configuration_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changes)


def schedule(topology, groups):
    """The order of transfers and products in a layer compiled for 8 chips: "start i", "done i", "product"."""
    embed, inner = 512, 1024
    config = ModelConfig(
        vocab_size=8,
        hidden_size=embed,
        num_layers=1,
        layer_pattern=("softmax",),
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rotary_dim=2,
        mlp_dim=inner,
        num_experts=8,
        expert_buffer=1.5,
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, expert=len(devices)), devices)

    def array(axes, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, logical_to_spec(axes)))

    up, down = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    params = {
        "router": array(("embed", "router_experts"), embed, 8),
        "gate": array(up, 8, embed, inner),
        "up": array(up, 8, embed, inner),
        "down": array(down, 8, inner, embed),
    }
    x = array(("batch", "length", None), len(devices), 512, embed, dtype=jnp.bfloat16)
    with platform.target("tpu"), jax.set_mesh(mesh):
        layer = jax.jit(
            lambda params, x: MixtureOfExperts(config, RuntimeConfig(token_groups=groups)).apply(
                {"params": params}, x, None
            )
        )
        hlo = layer.lower(params, x).compile(compiler_options=platform.compiler_options()).as_text()
    entry = hlo[hlo.index("\nENTRY") :]
    pattern = (
        r"%ragged-all-to-all-(start[.\d]*) =|ragged-all-to-all-(done)\(%ragged-all-to-all-start([.\d]*)\)"
        r"|(custom_call_target=\"tpu_custom_call\")"
    )
    events = []
    for started, done, which, product in re.findall(pattern, entry):
        events.append("product" if product else started.replace("start", "start ") if started else f"{done} {which}")
    assert "ragged-all-to-all(" not in entry
    return events


def summed_over_all(topology):
    """{kind: types} of the collectives of a sum over all devices of which each keeps a slice."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=len(devices)), devices)
    group = MeshGroup.of(mesh, ("fsdp",))
    total = jax.shard_map(
        lambda x: group.reduce_scatter(jnp.stack([x.T @ x] * 4), 1),
        mesh=mesh.abstract_mesh,
        in_specs=P("fsdp"),
        out_specs=P(None, "fsdp"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((len(devices) * 2048, 2048), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return collectives(jax.jit(total).lower(x).compile().as_text())


@pytest.fixture(scope="module")
def on_tpu():
    """{"schedule": {token groups: events}, "sum": of `summed_over_all`}, compiled for 8 and for 16 chips."""
    return ahead_of_time.answer_of(__name__, "v5e:2x4")


@pytest.mark.topology
def test_gradients_summed_over_all_devices_stay_slices(on_tpu):
    """In one step the compiler would make the whole sum on every device."""
    assert on_tpu["sum"] == {"reduce-scatter": ["f32[4,512,2048]", "f32[4,128,2048]"]}


@pytest.mark.topology
def test_on_tpu_rows_travel_while_others_are_multiplied(on_tpu):
    """The first group cannot but travel before all products, and the last one behind them."""
    exposed = {}
    for groups, events in on_tpu["schedule"].items():
        transfers = [event.removeprefix("start ") for event in events if event.startswith("start ")]
        assert len(transfers) == 2 * int(groups)
        assert events.count("product") == 3 * int(groups)
        spans = [events[events.index(f"start {i}") : events.index(f"done {i}")] for i in transfers]
        exposed[groups] = sum("product" not in span for span in spans) / len(spans)
    assert exposed == {"1": 1, "2": 1 / 2, "4": 1 / 4}


if __name__ == "__main__":
    schedules = {groups: schedule(sys.argv[1], groups) for groups in (1, 2, 4)}
    print(json.dumps({"schedule": schedules, "sum": summed_over_all("v5e:4x4")}))
