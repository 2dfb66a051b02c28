"""Sharded equals unsharded, and the errors of mesh and rules."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ConfigError, MeshConfig, ModelConfig
from mmx_jax.models.decoder import param_shardings
from mmx_jax.sharding import MESH_AXES, logical_to_spec, make_mesh
from tests import fake_devices


@pytest.fixture(scope="module")
def report():
    """{mesh: relative errors of a model on 8 devices}."""
    return fake_devices.answer_of("tests.sharded_model")


@pytest.mark.parametrize(
    ("mesh", "rows_per_device", "sharded"),
    [
        ("data=8", 1, False),
        ("fsdp=8", 1, True),
        ("data=2 fsdp=2 tensor=2", 2, True),
        ("expert_tensor=4 tensor=2", 2, True),
        ("fsdp=2 seq=4", 4, True),
        ("data=2 expert=4", 1, True),
        ("data=2 expert=4 with capacity", 1, True),
    ],
)
def test_sharded_equals_unsharded(report, mesh, rows_per_device, sharded):
    """Packed and padded rows: logits, router sums and gradients."""
    result = report[mesh]
    assert result["rows_per_device"] == rows_per_device
    assert (result["sharded"] > 0) == sharded
    assert (result["dropped"] > 0) == ("capacity" in mesh)
    for part in ("logits", "router", "gradients"):
        assert result[part] < 1e-5, part


def test_rules_give_mesh_axes():
    assert logical_to_spec(("embed", "qkv", "heads", "head_dim")) == P("fsdp", None, "tensor", None)
    assert logical_to_spec(("batch", None)) == P(("data", "fsdp", "expert", "expert_tensor"), None)


def test_unknown_logical_axis_is_an_error():
    with pytest.raises(ValueError, match=r"\['heds'\].*have no rule; known: batch, length"):
        logical_to_spec(("embed", "heds"))


def test_one_mesh_axis_on_two_dimensions_is_an_error():
    with pytest.raises(ValueError, match="one mesh axis on two dimensions"):
        logical_to_spec(("heads", "vocab"))
    with pytest.raises(ValueError, match="one mesh axis on two dimensions"):
        logical_to_spec(("batch", "experts"))  # both hold "expert"


def test_shapes_that_do_not_divide_are_an_error():
    config = ModelConfig(
        vocab_size=60, hidden_size=32, num_layers=2, layer_pattern=("lightning", "softmax"), num_heads=8,
        num_kv_heads=2, head_dim=8, rotary_dim=4, mlp_dim=48, num_experts=4,
    )  # fmt: skip
    many_kv_heads = dataclasses.replace(config, num_kv_heads=8, num_experts=8)
    with pytest.raises(ConfigError, match=r"embed/embedding \(60, 32\): axis 'vocab' of size 60 .* 8 devices"):
        param_shardings(many_kv_heads, AbstractMesh((1, 1, 1, 1, 8, 1), MESH_AXES))
    with pytest.raises(ConfigError, match=r"attention/key .*: axis 'kv_heads' of size 2 .* 4 devices"):
        param_shardings(config, AbstractMesh((1, 1, 1, 1, 4, 1), MESH_AXES))
    with pytest.raises(ConfigError, match=r"axis .experts. of size 4 .* 3 devices of mesh.expert=3 x mesh.tensor=1"):
        param_shardings(config, AbstractMesh((1, 1, 3, 1, 1, 1), MESH_AXES))


def test_wrong_number_of_devices_is_an_error():
    device = jax.devices()[:1]
    for sizes in (dict(data=3), dict(data=-1, tensor=2), dict(data=1, fsdp=2)):
        with pytest.raises(ConfigError, match="does not make 1 devices; set mesh"):
            make_mesh(MeshConfig(**sizes), device)
    mesh = make_mesh(MeshConfig(), device)
    assert dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1)
