"""Sharded equals unsharded, and the errors of mesh and rules."""

import dataclasses
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ConfigError, MeshConfig, ModelConfig
from mmx_jax.models.params import param_shardings
from mmx_jax.sharding import MESH_AXES, logical_to_spec, make_mesh
from tests.support import fake_devices
from tests.support.sharded_model import (
    ALONE,
    CAPACITY_FACTORS,
    CASES,
    LENGTH,
    MESHES,
    ROWS,
    SCANNED,
    SEGMENTS,
    STEPS,
    config,
)


@pytest.fixture(scope="module")
def report():
    """What tests/support/sharded_model.py found on 8 devices."""
    return fake_devices.answer_of("tests.support.sharded_model")


@pytest.mark.parametrize("packing", SEGMENTS)
@pytest.mark.parametrize(("mode", "mesh"), CASES)
def test_sharded_equals_unsharded(report, mode, mesh, packing):
    """Logits, metrics and gradients of the first step; the loss of ten steps and behind them; the parameters then."""
    for part, error in report[mode]["meshes"][mesh]["errors"][packing].items():
        assert error < 1e-5, part


@pytest.mark.parametrize("packing", SEGMENTS)
@pytest.mark.parametrize("mesh", SCANNED)
def test_a_scan_over_several_blocks_sharded_equals_unsharded(report, mesh, packing):
    for part, error in report["scanned"]["meshes"][mesh]["errors"][packing].items():
        assert error < 1e-5, part
    losses = report["scanned"]["losses"][packing]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(("mode", "mesh"), CASES)
def test_each_mesh_divides_what_its_axes_say(report, mode, mesh):
    sizes = dict.fromkeys(MESH_AXES, 1) | MESHES[mode][mesh]
    found = report[mode]["meshes"][mesh]
    rows = ROWS // math.prod(sizes[axis] for axis in ("data", "fsdp", "expert", "expert_tensor"))
    assert found["tokens"] == [rows, LENGTH // sizes["seq"]]
    # Of the parameters all but the norms and the router; the experts alone are half of them and more.
    most = {"data": 1, "seq": 1 / 7, "fsdp": 1 / 7, "tensor": 1 / 7, "expert": 1 / 3, "expert_tensor": 1 / 3}
    if mesh in ALONE:
        (axis,) = ALONE[mesh]
        assert found["parameters"] <= most[axis]
        assert (found["parameters"] == 1) == (most[axis] == 1)
    else:
        assert found["parameters"] < 0.7


@pytest.mark.parametrize(("mode", "mesh"), [case for case in CASES if "fsdp" not in case[1] and "seq" not in case[1]])
def test_no_step_gathers_experts(report, mode, mesh):
    """Of arrays only their weights have the width of an expert, or of its slice on a device, as a dimension."""
    width = config().mlp_dim
    widths = {str(width), str(width // MESHES[mode][mesh].get("expert_tensor", 1))}
    gathered = [kind for kind in report[mode]["meshes"][mesh]["gathered"] if widths & set(re.findall(r"\d+", kind[3:]))]
    assert not gathered


def test_with_fsdp_experts_are_gathered(report):
    """So that the test above would see it: the experts of one layer, of all widths."""
    gathered = report["dropless"]["meshes"]["fsdp=8"]["gathered"]
    assert f"f32[8,32,{config().mlp_dim}]" in gathered


@pytest.mark.parametrize("packing", SEGMENTS)
@pytest.mark.parametrize("mode", CAPACITY_FACTORS)
def test_the_steps_compared_train_and_drop(report, mode, packing):
    """Or the equality above would say little."""
    losses = report[mode]["losses"][packing]
    assert len(losses) == STEPS + 1
    assert losses[-1] < losses[0] - 1
    assert all((rate > 0.1) == (mode == "capacity") for rate in report[mode]["drop_rates"][packing])


def test_rules_give_mesh_axes():
    assert logical_to_spec(("embed", "qkv", "heads", "head_dim")) == P(("fsdp", "seq"), None, "tensor", None)
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
        vocab_size=60,
        hidden_size=32,
        num_layers=2,
        layer_pattern=("lightning", "softmax"),
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=4,
        mlp_dim=48,
        num_experts=4,
    )
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
