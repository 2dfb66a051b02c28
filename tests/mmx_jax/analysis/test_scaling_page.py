"""The page on scaling: written from its figures, and by formulas that hold where two programs can be compared."""

import importlib.util
import json

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", REPOSITORY / "benchmarks/scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(scaling):
    return json.loads(scaling.RESULTS.read_text())


def test_the_page_is_what_the_figures_give(scaling, results, tmp_path):
    scaling.write_page(results, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == scaling.PAGE.read_text(), "run benchmarks/scaling.py --write"


def load(kind, dtype, axes, link_bytes, torus_axes=(0,)):
    return dict(kind=kind, dtype=dtype, axes=axes, count=1, bytes=0, link_bytes=link_bytes, torus_axes=torus_axes)


PROGRAM = dict(
    mesh=dict(data=2, fsdp=2, expert=4, seq=2),
    chips=32,
    slices=2,
    tokens=100,
    flops_per_token=300 * 459e10,
    forward_flops_per_token=100 * 459e10,
    loads=[
        load("ragged-all-to-all", "bf16", ["expert"], 100e9, (1,)),
        load("all-gather", "bf16", ["fsdp", "seq"], 300e9),
        load("all-gather", "f32", ["seq"], 20e9),
        load("collective-permute", "bf16", ["seq"], 50e9),
        load("slices-all-reduce", "f32", ["slices"], 6.25e9, ()),
    ],
)


def test_seconds_are_bytes_over_the_links_of_the_data_sheet(scaling):
    assert list(scaling.by_class(PROGRAM).values()) == [1.0, 3.0, 0.5, 0.2, 1.0]
    assert scaling.compute_seconds(PROGRAM, 100) == pytest.approx(400.0)
    assert scaling.busiest_axis(PROGRAM) == pytest.approx(3.7)  # weights, keys and states share an axis


def test_other_chips_have_what_the_rules_say(scaling):
    """Half the tokens on four times the chips, of which four times as many share a row."""
    found = scaling.extrapolate(PROGRAM, chips=128, tokens=50, seq=8, slices=2, network=1.0)
    want = {
        "tokens to experts": 0.5,
        "weights and gradients": 3.0 * (1 - 1 / 16) / (1 - 1 / 4),
        "keys and values": 0.5 * 2,
        "lightning states": 0.2 * 2 * 4,
        "between slices": 1024 / 64,
    }
    assert found == pytest.approx(want)


def test_a_program_on_its_own_chips_is_itself(scaling, results):
    for name in ("8k", "128k", "1M"):
        program = results[name]
        assert scaling.extrapolate(program, chips=program["chips"], tokens=program["tokens"]) == pytest.approx(
            scaling.by_class(program)
        )


def test_the_rules_predict_the_program_for_four_times_the_chips(scaling, results):
    program = results["8k, 4096 chips"]
    predicted = scaling.extrapolate(results["8k"], chips=program["chips"], tokens=program["tokens"])
    assert predicted == pytest.approx(scaling.by_class(program), rel=0.03, abs=0.01)


def test_a_chip_with_the_fewest_tokens_sends_as_long_as_it_computes(scaling, results):
    fewest = scaling.fewest_tokens(results["8k"])
    parts = scaling.extrapolate(results["8k"], chips=1024, tokens=fewest)
    assert sum(parts.values()) == pytest.approx(scaling.compute_seconds(results["8k"], fewest), rel=1e-3)
