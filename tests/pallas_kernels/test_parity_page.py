"""The page of measured errors: written from its figures, complete, and within what the project promises."""

import importlib.util
import json

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("parity_matrix", REPOSITORY / "benchmarks/parity_matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_figures_give(matrix, tmp_path):
    matrix.write_page(json.loads(matrix.RESULTS.read_text()), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == matrix.PAGE.read_text(), "run benchmarks/parity_matrix.py"


def test_every_implementation_and_case_is_there_and_exact(matrix):
    results = json.loads(matrix.RESULTS.read_text())
    for table, (cases, _, implementations) in matrix.TABLES.items():
        for name in implementations:
            columns = [found[table][name] for found in results.values() if name in found.get(table, {})]
            assert columns, f"{table}: {name} was never measured"
            for column in columns:
                assert set(column) == set(cases)
                for case, text in column.items():
                    if not text.startswith("refused"):
                        assert float(text) < (1e-6 if case == "float32" else 4e-3), (table, name, case)


def test_a_case_is_measured_or_refused(matrix):
    measured = matrix.cell(matrix.grouped_error, "tiled_xla", dict(sizes=[3, 5], width=8, columns=4, dtype="float32"))
    assert 0 < float(measured) < 1e-6
    assert matrix.cell(matrix.lightning_error, "mosaic_tpu", dict(dim=96)).startswith("refused: ")
