"""Checkpoints of the Hugging Face Hub: how to fetch one, and the fetching, over `huggingface_hub`."""

import dataclasses
import errno
import fnmatch
import glob
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Files of the top folder of a repository that a checkpoint consists of.
FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "configuration_minimax*.py",
    "modeling_minimax*.py",
)
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


class HubError(RuntimeError):
    """A repository that cannot be fetched; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """`ORG/NAME` of the Hub, and a branch, tag or commit of it."""

    name: str
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """Where `download` puts it: the reference itself, as a relative path."""
        return Path(f"{self.name}@{self.revision}" if self.revision else self.name)

    @property
    def command(self) -> str:
        """The shell command that does the same."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{revision} --local-dir {self.folder}"


def parse(reference: str | os.PathLike) -> Repository | None:
    """The repository that `ORG/NAME` or `ORG/NAME@REVISION` names; None for anything else."""
    match = _REFERENCE.fullmatch(os.fspath(reference))
    return Repository(match[1], match[2]) if match else None


def advice(path: str | os.PathLike) -> str:
    """For errors about a folder that does not exist: how to download it, empty where it names no repository."""
    if (repository := parse(path)) is None:
        return ""
    return (
        f". If {repository.name} is a repository of the Hugging Face Hub, download it first: {repository.command} "
        "(infer.py does so with --download)"
    )


def download(reference: str, say: Callable[[str], None] = print) -> Path:
    """Fetches the checkpoint and its tokenizer; one that was interrupted goes on where it stopped.

    Args:
      reference: `ORG/NAME` or `ORG/NAME@REVISION`.
      say: is told what comes, how large it is and where it goes, before it does.

    Returns:
      The folder, named as the reference.

    Raises:
      HubError: no such repository, no access, no network, no room on the disk, no huggingface_hub.
    """
    repository = parse(reference)
    if repository is None:
        raise HubError(f"{reference} names no repository of the Hub: give ORG/NAME, or ORG/NAME@REVISION")
    hub = _library()
    try:
        info = hub.HfApi().model_info(repository.name, revision=repository.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings if _wanted(file.rfilename)}
        _check(repository, sizes)
        missing = sum(size for name, size in sizes.items() if not _is_there(repository.folder / name, size))
        say(
            f"{repository.name} at {(info.sha or 'its newest commit')[:12]}: {len(sizes)} files, "
            f"{sum(sizes.values()) / 1e9:.2f} GB, of which {missing / 1e9:.2f} GB are to come, into {repository.folder}"
        )
        _check_room(repository.folder, missing)
        hub.snapshot_download(
            repository.name,
            revision=info.sha or repository.revision,
            local_dir=str(repository.folder),
            allow_patterns=[glob.escape(name) for name in sizes],
        )
    except HubError:
        raise
    except Exception as error:  # of the library, of its HTTP client (which one depends on the version), of the system
        raise HubError(_explain(hub, repository, error)) from error
    return repository.folder


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors  # noqa: F401
    except ImportError as error:
        raise HubError(f"--download needs the package huggingface_hub: pip install 'mmx_jax[hub]' ({error})") from None
    return huggingface_hub


def _wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check(repository: Repository, sizes: dict[str, int]):
    if "config.json" not in sizes or not any(name.endswith(".safetensors") for name in sizes):
        raise HubError(
            f"{repository.name} cannot be read here: it lacks config.json or *.safetensors in its top folder"
        )


def _check_room(folder: Path, needed: int):
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HubError(
            f"{folder}: disk full: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; free some space, "
            "or run the command in a folder of a larger disk"
        )


def _explain(hub: ModuleType, repository: Repository, error: Exception) -> str:
    """One line on an error of the library; the classes stand from the particular to the general."""
    name, errors = repository.name, hub.errors
    login = "log in with `hf auth login`, or set HF_TOKEN"
    causes = (
        ("GatedRepoError", f"{name} is gated: accept its terms on https://huggingface.co/{name}, then {login}"),
        ("RevisionNotFoundError", f"{name} has no revision {repository.revision}: name a branch, a tag or a commit"),
        ("RepositoryNotFoundError", f"no repository {name} on the Hub, or a private one: check the name, or {login}"),
        ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set: unset it to download, or leave --download out"),
    )
    for kind, message in causes:
        if isinstance(error, getattr(errors, kind, ())):
            return message
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"{error.filename or repository.folder}: {error.strerror}; the same command goes on where it stopped"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hub refuses access to {name} (401): {login}"
    answer = f"the Hub answers {status}" if status else "the Hub cannot be reached, or the connection broke"
    return f"{name}: {answer} ({type(error).__name__}: {reason}); the same command goes on where it stopped"
