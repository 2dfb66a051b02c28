"""Which rows a process reads, and which parts of them its devices get; also on the hosts of a TPU slice."""

import json
import shlex
import sys

import numpy as np
import pytest

from benchmarks.topologies import CONFIGURATIONS
from mmx_jax import sharding
from mmx_jax.analysis import aot
from mmx_jax.config import Config, ConfigError, TrainingConfig
from mmx_jax.config import io as config_io
from mmx_jax.data import device_batch
from mmx_jax.training import batches
from tests.support import ahead_of_time


def test_parts_of_a_batch_are_joined_alike_by_any_number_of_processes():
    parts = [np.arange(16).reshape(8, 2) + 100 * part for part in range(3)]
    whole = device_batch.join_parts(parts)
    assert sorted(whole.ravel()) == sorted(np.ravel(parts))
    for count in (2, 4):
        own = [device_batch.join_parts([np.split(part, count)[index] for part in parts]) for index in range(count)]
        np.testing.assert_array_equal(np.concatenate(own), whole)


@pytest.mark.parametrize("rows, length", [((4, 6), (0, 5)), ((10, 12), (5, 10)), ((4, 5), None), ((11, 12), (2, 3))])
def test_a_part_is_cut_from_rows_that_need_not_be_neighbours(rows, length):
    whole = np.arange(120).reshape(12, 10)
    numbers = np.array([0, 4, 5, 10, 11])
    index = slice(*rows), slice(None) if length is None else slice(*length)
    np.testing.assert_array_equal(device_batch.part_of(whole[numbers], numbers, index), whole[index])


def test_a_part_may_be_all():
    whole = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(device_batch.part_of(whole, np.arange(4), (slice(None), slice(1, 3))), whole[:, 1:])


def test_rows_that_others_feed_are_told_with_the_shards_that_spare_them():
    thirds = [np.arange(4 * process, 4 * process + 4) for process in range(3)]
    assert device_batch.reading_of(thirds, 12, 9) == "each packs up to 4, and its devices hold 4 or parts of them"
    assert device_batch.reading_of(thirds, 12, 8).endswith(
        "up to 6, and its devices hold 4 or parts of them; a new run with data.shards=3 would pack no others"
    )
    shared = [np.arange(8), np.arange(8), np.arange(8, 16), np.arange(8, 16)]
    assert device_batch.reading_of(shared, 16, 8) == "each packs up to 8, and its devices hold 8 or parts of them"
    scattered = [np.array([0, 1, 4, 5]), np.array([2, 3, 6, 7])]
    assert device_batch.reading_of(scattered, 8, 4) == "each packs up to 4, and its devices hold 4 or parts of them"
    assert device_batch.reading_of(scattered, 8, 2).endswith(
        "up to 8, and its devices hold 4 or parts of them; a new run with data.shards=4 would pack no others"
    )


def test_hosts_of_a_slice_are_fed():
    """What each host would read in the training runs of benchmarks/TOPOLOGIES.md, with the shards of their configs."""
    lines = ahead_of_time.answer_of(__name__, "v5p:8x8x16")
    start = (
        "256 processes, rows of {} tokens: of every {} each packs up to {}, and its devices hold {} or parts of them"
    )
    assert lines["train_8k"] == [
        start.format(8192, 2048, 32, 8) + "; a new run with data.shards=1024 would pack no others"
    ]
    assert lines["train_8k_32m"][0].startswith(start.format(8192, 4096, 64, 16))
    assert lines["train_128k"] == [start.format(131072, 128, 2, 2)]
    assert lines["train_1m"] == [start.format(1048576, 16, 1, 1)]


def test_a_mesh_that_does_not_divide_a_batch_is_refused_with_those_that_do():
    training = TrainingConfig(total_tokens=6 * 32, sequence_length=32, batch_tokens=6 * 32)
    config = Config(training=training)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    batches.check_batches(config, sharding.abstract_mesh(sizes | {"data": 3, "seq": 4}))
    with pytest.raises(
        ConfigError, match=r"6 rows of 32 tokens .* over 4 batch shards; mesh\.data x .* 1, 2, 3, 6, other"
    ):
        batches.check_batches(config, sharding.abstract_mesh(sizes | {"data": 2, "expert": 2}))


def lines_of(topology):
    devices, lines = aot.topology_devices(topology), {}
    for name, (_, arguments) in CONFIGURATIONS.items():
        words = shlex.split(arguments)
        if words[0] == "train.py" and f"--topology={topology}" in words:
            (config,) = [word.partition("=")[2] for word in words if word.startswith("--config=")]
            overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            config = config_io.apply_overrides(config_io.load_config(config), overrides)
            lines[name] = device_batch.reading_lines(config, sharding.make_mesh(config.mesh, devices))
    return lines


if __name__ == "__main__":
    print(json.dumps(lines_of(sys.argv[1])))
