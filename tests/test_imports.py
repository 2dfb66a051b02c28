"""The layering of the rooms, read from their import statements; nothing is imported here."""

import ast
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

# Room -> the rooms it may import, besides itself. A room is a folder or module of mmx_jax, or pallas_kernels.
# A new one must be entered here, where its place among the others is seen.
ALLOWED = {
    "pallas_kernels": set(),
    "storage": set(),
    "progress": set(),
    "config": {"storage"},
    "distributed": set(),
    "sharding": {"config"},
    "metrics": {"storage"},
    "parallel": {"sharding", "pallas_kernels"},
    "layers": {"config", "sharding", "parallel", "pallas_kernels"},
    "models": {"config", "sharding", "layers"},
    "data": {"config", "storage", "sharding"},
    "checkpoints": {"config", "storage", "progress", "sharding", "models", "data"},
    "convert": {"config", "storage", "progress", "models", "checkpoints"},
    "training": {
        "config",
        "storage",
        "progress",
        "distributed",
        "sharding",
        "metrics",
        "models",
        "data",
        "checkpoints",
        "pallas_kernels",
    },
    "inference": {"config", "sharding", "layers", "models", "data", "checkpoints"},
    # Reads all of them; nothing but the mains and the benchmarks imports it.
    "analysis": {
        "config",
        "sharding",
        "parallel",
        "layers",
        "models",
        "data",
        "training",
        "inference",
        "pallas_kernels",
    },
    "cli": {
        "__init__",
        "config",
        "distributed",
        "metrics",
        "data",
        "checkpoints",
        "convert",
        "training",
        "inference",
        "analysis",
    },
    # mmx_jax/__init__.py: `from_pretrained`, by a lazy import, so that a config costs no jax.
    "__init__": {"inference"},
}

# What else a group may import; the others may use everything that pyproject.toml names.
ONLY_EXTERNAL = {
    "pallas_kernels": {"jax", "numpy"},
    "config": set(),
}

# Of an extra: imported where it is used, so that the core runs without it.
OPTIONAL = {
    "grain",
    "array_record",
    "pyarrow",
    "zstandard",
    "tensorboardX",
    "matplotlib",
    "wandb",
    "huggingface_hub",
    "starlette",
    "uvicorn",
    "PIL",
    "qwix",
    "tokamax",
}

# Never at run time, whatever is installed.
FORBIDDEN = {"torch", "transformers", "safetensors", "tensorflow", "clu", "ml_collections", "einops", "chex"}

# Written beside exported weights, for transformers to load there. Nothing here imports these files.
SHIPPED = sorted((REPOSITORY / "mmx_jax/checkpoints/shipped").glob("*.py"))


def source_files() -> list[Path]:
    files = [path for folder in ("mmx_jax", "pallas_kernels") for path in (REPOSITORY / folder).rglob("*.py")]
    files = [path for path in files if path not in SHIPPED]
    return sorted([*files, *REPOSITORY.glob("*.py"), *(REPOSITORY / "configs").rglob("*.py")])


def group_of(parts: tuple[str, ...]) -> str:
    """`parts`: a dotted name, split."""
    if parts[0] != "mmx_jax":
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def file_group(path: Path) -> str:
    return group_of(path.relative_to(REPOSITORY).with_suffix("").parts)


def imported_names(node: ast.AST, path: Path) -> list[tuple[str, ...]]:
    """Dotted names that the statement `node` imports; of `from mmx_jax import x` it is `mmx_jax.x`."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = tuple(node.module.split(".")) if node.module else ()
    if node.level:
        package = path.relative_to(REPOSITORY).parent.parts
        module = package[: len(package) - node.level + 1] + module
    if module == ("mmx_jax",):
        return [(*module, alias.name) for alias in node.names]
    return [module]


def all_imports(path: Path) -> list[tuple[str, ...]]:
    return [name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node, path)]


def internal(name: tuple[str, ...]) -> bool:
    return name[0] in ("mmx_jax", "pallas_kernels")


files = pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))


@files
def test_imports_follow_the_layers(path):
    group = file_group(path)
    if path.relative_to(REPOSITORY).parts[0] not in ("mmx_jax", "pallas_kernels") or path.name == "__main__.py":
        return  # programs and configs stand on top of everything
    assert group in ALLOWED, f"{path}: give {group!r} its place in ALLOWED"
    for name in filter(internal, all_imports(path)):
        assert group_of(name) in ALLOWED[group] | {group}, f"{path}: {group} must not import {'.'.join(name)}"


@files
def test_external_imports(path):
    group = file_group(path)
    for name in all_imports(path):
        if internal(name) or name[0] in sys.stdlib_module_names:
            continue
        assert name[0] not in FORBIDDEN, f"{path} imports {name[0]}, which is for tests and benchmarks only"
        assert group not in ONLY_EXTERNAL or name[0] in ONLY_EXTERNAL[group], f"{path} must not import {name[0]}"


@files
def test_optional_packages_are_imported_where_they_are_used(path):
    for node in ast.parse(path.read_text()).body:
        for name in imported_names(node, path):
            assert name[0] not in OPTIONAL, f"{path}:{node.lineno} imports {name[0]} at its head; it is of an extra"


def test_configs_import_the_configuration_alone():
    for path in (REPOSITORY / "configs").rglob("*.py"):
        groups = {group_of(name) for name in all_imports(path) if name[0] not in sys.stdlib_module_names}
        assert groups <= {"config"}, path


def test_shipped_files_need_torch_and_transformers_alone():
    assert [path.name for path in SHIPPED] == ["configuration_mmx.py", "modeling_mmx.py"]
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:  # beside it in the exported folder
                assert (node.level, node.module) == (1, "configuration_mmx")
            else:
                for name in imported_names(node, path):
                    assert name[0] in {"torch", "transformers"} | sys.stdlib_module_names, f"{path}: {name}"
    for path in source_files():
        assert not any("shipped" in name for name in all_imports(path)), path


def test_the_layers_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {group for group, below in ALLOWED.items() if below <= done} - done
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_the_checks_see_a_violation():
    path = REPOSITORY / "mmx_jax/layers/example.py"
    source = "from ..training import loss\nimport torch.nn\nfrom mmx_jax import inference\ndef f():\n  import grain\n"
    names = [name for node in ast.walk(ast.parse(source)) for name in imported_names(node, path)]
    assert names == [("mmx_jax", "training"), ("torch", "nn"), ("mmx_jax", "inference"), ("grain",)]
    assert [group_of(name) for name in names] == ["training", "torch", "inference", "grain"]
