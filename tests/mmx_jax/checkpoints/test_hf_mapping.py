"""The rules that map tensors to parameters."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.checkpoints import hf_mapping, orbax_slices
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_config import model_config_from_hf
from mmx_jax.config import ModelConfig
from mmx_jax.models.params import abstract_params
from tests.support.checkpoint_files import hf_config


def test_rules_map_every_tensor_of_the_released_model_once():
    config = ModelConfig()
    mappings = hf_mapping.expand(config)
    assert len({mapping.hf for mapping in mappings}) == len(mappings) == 8243
    assert sum(int(np.prod(mapping.hf_shape)) for mapping in mappings) == 456_089_655_296
    assert sum(int(np.prod(shape)) for shape in hf_mapping.leaf_shapes(config, mappings).values()) == 456_089_655_296


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3, "layer_pattern": ("softmax", "lightning", "softmax")},
        {"num_layers": 4, "layer_pattern": ("lightning",), "param_dtype": "bfloat16"},
        {"num_layers": 2, "layer_pattern": ("softmax",), "num_experts": 1, "experts_per_token": 1},
    ],
)
def test_rules_fill_exactly_the_parameters_of_the_decoder(changes):
    config = ModelConfig(**changes)
    parameters = orbax_slices.flatten(abstract_params(config))
    mappings = hf_mapping.expand(config)
    hf_mapping.check_parameters(config, mappings, {path: leaf.shape for path, leaf in parameters.items()})
    float32 = {mapping.leaf for mapping in mappings if mapping.float32}
    for path, leaf in parameters.items():
        assert leaf.dtype == (np.float32 if path in float32 else config.param_dtype), path


def test_parameters_and_rules_that_differ_are_listed_on_both_sides():
    config = model_config_from_hf(hf_config())
    mappings = hf_mapping.expand(config)
    shapes = hf_mapping.leaf_shapes(config, mappings)
    hf_mapping.check_parameters(config, mappings, shapes)
    renamed = {path: shape for path, shape in shapes.items() if path != ("lm_head", "kernel")} | {("head", "w"): (1,)}
    with pytest.raises(ConversionError, match=r"no rule fills \['head/w'\].*'lm_head/kernel'"):
        hf_mapping.check_parameters(config, mappings, renamed)
    with pytest.raises(ConversionError, match="final_norm/scale has shape"):
        hf_mapping.check_parameters(config, mappings, shapes | {("final_norm", "scale"): (65,)})
    with pytest.raises(ConversionError, match="filled twice"):
        hf_mapping.check_parameters(config, [*mappings, mappings[0]], shapes)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data())
def test_strip_copy_equals_assignment(shape, data):
    permutation = data.draw(st.permutations(range(len(shape))))
    values = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16).view(ml_dtypes.bfloat16)
    for source, like in ((values.transpose(permutation), None), (values, permutation)):
        if like is None:
            out = np.empty(source.shape, source.dtype)
        else:
            out = np.empty([shape[axis] for axis in permutation], source.dtype).transpose(np.argsort(permutation))
        hf_mapping.copy_strips(out, source)
        assert np.array_equal(out.view(np.uint16), source.view(np.uint16))
