"""Checkpoints of the Hub: what is asked of huggingface_hub, and what is made of its errors; the library is a fake."""

import shutil
import sys
import types

import pytest

from mmx_jax.checkpoints import hub
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hub import HubError, Repository
from mmx_jax.checkpoints.open import CARRIED, resolve

SIZES = {
    "config.json": 10,
    "model-00000-of-00002.safetensors": 600,
    "model-00001-of-00002.safetensors": 400,
    "model.safetensors.index.json": 5,
    "tokenizer.json": 20,
    "generation_config.json": 3,
    "README.md": 7000,
    "pytorch_model.bin": 9000,
    "original/model.safetensors": 9000,
    "figures/config.json": 1,
}
WANTED = [name for name in SIZES if "/" not in name and name not in ("README.md", "pytorch_model.bin")]


class Fake:
    """A module huggingface_hub that holds one repository, or raises."""

    def __init__(self, sizes=None, error=None):
        self.sizes, self.error, self.asked = SIZES if sizes is None else sizes, error, []
        module, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
        for name in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            setattr(errors, name, type(name, (OSError,), {}))
        errors.GatedRepoError = type("GatedRepoError", (errors.RepositoryNotFoundError,), {})
        errors.OfflineModeIsEnabled = type("OfflineModeIsEnabled", (ConnectionError,), {})
        module.errors, module.HfApi, module.snapshot_download = errors, lambda: self, self.snapshot_download
        self.module = module

    def model_info(self, name, *, revision, files_metadata):
        assert files_metadata
        self.asked.append((name, revision))
        files = [types.SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return types.SimpleNamespace(siblings=files, sha="0123456789abcdef")

    def snapshot_download(self, name, *, revision, local_dir, allow_patterns):
        self.asked.append((name, revision, local_dir, allow_patterns))
        if self.error is not None:
            raise self.error


@pytest.fixture
def install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def install(**settings):
        fake = Fake(**settings)
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake.module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", fake.module.errors)
        return fake

    return install


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("MiniMaxAI/MiniMax-Text-01", Repository("MiniMaxAI/MiniMax-Text-01")),
        ("a/b.c@v1.0", Repository("a/b.c", "v1.0")),
        ("a/b@refs/pr/3", Repository("a/b", "refs/pr/3")),
        *((text, None) for text in ("a", "/a/b", "./a/b", "../b", "a/b/c", "a/b@", "a/b c", "~/b", "", "a/.b")),
    ],
)
def test_references(text, repository):
    assert hub.parse(text) == repository


def test_a_missing_folder_tells_how_to_download():
    with pytest.raises(ConversionError) as caught:
        resolve("org/name@v2")
    assert "org/name@v2: no such folder" in str(caught.value)
    assert "hf download org/name --revision v2 --local-dir org/name@v2" in str(caught.value)
    assert "--download" in str(caught.value)
    with pytest.raises(ConversionError) as caught:
        resolve("/nowhere/at/all")
    assert "hf download" not in str(caught.value)


def test_every_file_that_travels_with_weights_is_fetched():
    assert set(CARRIED) <= set(hub.FILES)


@pytest.mark.parametrize("reference", ["org/name", "org/name@v2"])
def test_download_asks_for_what_is_needed_and_tells_the_size_first(install, tmp_path, reference):
    fake, told = install(), []
    (tmp_path / reference).mkdir(parents=True)
    (tmp_path / reference / "tokenizer.json").write_bytes(bytes(20))  # from before
    assert hub.download(reference, lambda line: told.append((line, len(fake.asked)))) == hub.parse(reference).folder
    revision = "v2" if "@" in reference else None
    assert fake.asked == [
        ("org/name", revision),
        ("org/name", "0123456789abcdef", reference, WANTED),
    ]
    ((line, asked),) = told
    assert asked == 1 and "org/name at 0123456789ab: 6 files, 0.00 GB" in line and line.endswith(f"into {reference}")


def test_download_refuses_what_does_not_fit(install, monkeypatch):
    fake = install(sizes=SIZES | {"model-00000-of-00002.safetensors": 5 * 10**9})
    usage = types.SimpleNamespace(total=0, used=0, free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HubError, match=r"disk full: 5.00 GB are needed and 2.00 GB are free"):
        hub.download("org/name", lambda line: None)
    assert len(fake.asked) == 1


@pytest.mark.parametrize("left_out", ["config.json", "safetensors"])
def test_download_refuses_what_is_no_checkpoint(install, left_out):
    install(sizes={name: size for name, size in SIZES.items() if left_out not in name or "/" in name})
    with pytest.raises(HubError, match="org/name cannot be read here"):
        hub.download("org/name", lambda line: None)


class HttpError(Exception):
    def __init__(self, status):
        super().__init__(f"{status} error\nand more lines")
        self.response = types.SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda errors: errors.GatedRepoError("403"), r"gated: accept its terms .*hf auth login"),
        (lambda errors: errors.RepositoryNotFoundError("401"), "no repository org/name .* private"),
        (lambda errors: errors.RevisionNotFoundError("404"), "has no revision v2"),
        (lambda errors: errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (lambda errors: HttpError(401), r"refuses access to org/name \(401\)"),
        (lambda errors: HttpError(503), r"answers 503 .*goes on where it stopped"),
        (lambda errors: ConnectionError("no route"), r"cannot be reached.*no route.*goes on where it stopped"),
        (lambda errors: OSError(28, "No space left on device", "x"), "x: No space left on device"),
    ],
)
def test_errors_become_one_line(install, make, message):
    fake = install()
    fake.error = make(fake.module.errors)
    with pytest.raises(HubError, match=message) as caught:
        hub.download("org/name@v2", lambda line: None)
    assert "\n" not in str(caught.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'mmx_jax\[hub\]'"):
        hub.download("org/name")
    with pytest.raises(HubError, match="give ORG/NAME"):
        hub.download("/some/folder")


def test_the_installed_library_has_what_is_used():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    import inspect

    import huggingface_hub.errors as errors

    used = {"revision", "local_dir", "allow_patterns"}
    assert used <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)
    assert {"revision", "files_metadata"} <= set(inspect.signature(huggingface_hub.HfApi.model_info).parameters)
    for name in ("GatedRepoError", "RevisionNotFoundError", "RepositoryNotFoundError", "OfflineModeIsEnabled"):
        assert issubclass(getattr(errors, name), Exception)
