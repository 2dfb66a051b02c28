"""Identity of the data of a run: content, never its place or its time."""

import collections
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence

import tokenizers

from mmx_jax.config import ConfigError
from mmx_jax.data.file_bytes import content_digest, evenly, reading
from mmx_jax.data.sources import CheckedSource
from mmx_jax.data.tokenizer import Tokenizer, TokenizerError

# A source is digested whole up to so many bytes and files. Of a larger one blocks of 64 KiB are read, about so many in
# all, of at most so many files; the sizes of all files count in any case.
_WHOLE_BYTES = 256 << 20
_BLOCKS = 4096
_FILES = 4096
_GROUPS = 256  # entries that a checkpoint holds for a source
_PATH_FIELDS = re.compile(r"data\.sources\.\d+\.path|data\.tokenizer")


def source_identity(source: CheckedSource) -> dict:
    """{"documents", "bytes", "files"}: of every file, or of neighbours together where files are many,
    [first name, files, bytes, digest]; JSON."""
    root = os.path.commonpath([path.parent for path in source.paths])
    with reading(source.paths[0]):
        sizes = [path.stat().st_size for path in source.paths]
    blocks = _BLOCKS
    if sum(sizes) > _WHOLE_BYTES or len(sizes) > _FILES:
        blocks = min(256, max(3, _BLOCKS // len(sizes)))
    read = set(evenly(len(sizes), _FILES))
    checksums = source.checksums or [0] * len(sizes)
    size = -(-len(sizes) // _GROUPS)
    groups = []
    for begin in range(0, len(sizes), size):
        digest, members = hashlib.blake2b(digest_size=12), range(begin, min(begin + size, len(sizes)))
        for i in members:
            content = content_digest(source.paths[i], blocks) if i in read else ""
            digest.update(f"{sizes[i]} {checksums[i]} {content}\n".encode())
        name = os.path.relpath(source.paths[begin], root)
        groups.append([ascii(name)[1:-1], len(members), sum(sizes[i] for i in members), digest.hexdigest()])
    return {"documents": len(source), "bytes": sum(sizes), "files": groups}


def tokenizer_identity(tokenizer: Tokenizer) -> dict:
    """Digests of what determines the tokens of a text; JSON.

    `rules` holds for one version of the tokenizers library, which may write the same tokenizer in another way.
    """
    vocabulary = json.dumps(sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items()))
    return {
        "vocabulary": _sha256(vocabulary),
        "rules": _sha256(tokenizer.backend.to_str()),
        "library": tokenizers.__version__,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


# -- comparing --------------------------------------------------------------------------------------------------------


def differences(saved: dict, current: dict, names: Sequence[str]) -> list[str]:
    """Differences between two identities of `data.TrainIterator`, in words.

    Args:
      names: what to call the sources of `current`.
    """
    found = []
    for field, value in current.items():
        before = saved.get(field)
        if field == "sources":
            found += _source_differences(before or [], value, names)
        elif field == "tokenizer":
            found += _tokenizer_differences(before, value) if before else []
        elif before != value:
            found.append(f"{field} was {before!r} and is {value!r}")
    return found


def is_complete(saved: dict) -> bool:
    """Whether an identity tells content: those saved by older versions hold names and numbers of documents."""
    return "tokenizer" in saved and all(isinstance(source, dict) for source in saved["sources"])


def _source_differences(saved: Sequence, current: Sequence[dict], names: Sequence[str]) -> list[str]:
    if len(saved) != len(current):
        return [f"there were {len(saved)} data sources and there are {len(current)}"]
    found = []
    for before, now, name in zip(saved, current, names, strict=True):
        if not isinstance(before, dict):  # [name, documents] of an older version
            changed = before[1] != now["documents"]
            found += [f"data source {name} held {before[1]} documents and holds {now['documents']}"] if changed else []
        elif [group[1:] for group in before["files"]] != [group[1:] for group in now["files"]]:
            found.append(
                f"data source {name} has changed: {_file_difference(before['files'], now['files'])} "
                f"({before['documents']} documents, {before['bytes']:,} bytes before; {now['documents']}, "
                f"{now['bytes']:,} now)"
            )
        elif before["documents"] != now["documents"]:
            found.append(f"data source {name} held {before['documents']} documents and holds {now['documents']}")
    return found


def _file_difference(before: Sequence[list], now: Sequence[list]) -> str:
    """Names the files that came, went or changed; where files are many, the first neighbours that differ."""
    counts = [sum(group[1] for group in groups) for groups in (before, now)]
    if max(counts) > _GROUPS:
        pairs = zip(before, now, strict=False)
        changed = next((new[0] for old, new in pairs if old[1:] != new[1:]), now[-1][0])
        return f"{counts[0]} files were there and {counts[1]} are, and the first to differ is at or after {changed}"
    old, new = (collections.Counter(group[3] for group in groups) for groups in (before, now))
    gone = [group[0] for group in before if group[3] not in new]
    come = [group[0] for group in now if group[3] not in old]
    parts = {
        "other content in": [name for name in come if name in gone],
        "new": [name for name in come if name not in gone],
        "gone": [name for name in gone if name not in come],
    }
    text = "; ".join(f"{what} {_listed(files)}" for what, files in parts.items() if files)
    return text or "the same files in another order or number"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tokenizer_differences(before: dict, now: dict) -> list[str]:
    fields = ["vocabulary", "eos_id", "pad_id"]
    if before["library"] == now["library"]:
        fields.append("rules")
    changed = [field for field in fields if before[field] != now[field]]
    return [f"the tokenizer has changed ({', '.join(changed)})"] if changed else []


# -- configuration ----------------------------------------------------------------------------------------------------


def with_numbered_sources(config: dict) -> dict:
    """A stored config in which `data.sources` is a dictionary by number, so that each field is compared by itself."""
    data = config.get("data", {})
    sources = {str(i): source for i, source in enumerate(data.get("sources", ()))}
    return config | {"data": data | {"sources": sources}}


def is_place(field: str) -> bool:
    """Whether a config field says where data lies: the content decides, see `differences`."""
    return _PATH_FIELDS.fullmatch(field) is not None


def check_named_tokenizer(named: str, used: Tokenizer, folder: pathlib.Path) -> list[str]:
    """Compares the run's own tokenizer with that of `data.tokenizer`; returns what to tell the user.

    Args:
      named: data.tokenizer; "": none.
      used: the run's, read from `folder`.

    Raises:
      ConfigError: it is another one.
    """
    if not named:
        return []
    try:
        other = Tokenizer.load(named)
    except (OSError, TokenizerError) as error:
        return [f"data.tokenizer={named} cannot be read, the run goes on with its own in {folder}: {error}"]
    if changed := _tokenizer_differences(tokenizer_identity(used), tokenizer_identity(other)):
        raise ConfigError(
            f"data.tokenizer={named} is not the tokenizer of this run: {changed[0]}. Set data.tokenizer={folder}, "
            "which the run was started with, or start in a new --workdir"
        )
    return []
