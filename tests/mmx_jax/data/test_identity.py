"""What makes data and tokenizers the same: content, at a bounded cost; and what messages say of a difference."""

import json
import os

import pytest

from mmx_jax.config import ConfigError, SourceConfig
from mmx_jax.data import file_bytes
from mmx_jax.data import identity as data_identity
from mmx_jax.data.sources import open_source
from mmx_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["some text to learn from"] * 3, 300)


def identity_of(path):
    return data_identity.source_identity(open_source(SourceConfig(path=str(path))))


def difference(before, after):
    pair = [{"sources": [json.loads(json.dumps(identity))]} for identity in (before, after)]
    return "".join(data_identity.differences(*pair, ["the source"]))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (tmp_path / "data" / name).write_text(f"text of {name}")
    return tmp_path / "data"


def test_a_folder_is_its_content(folder):
    before = identity_of(folder)
    folder.rename(folder.parent / "moved")
    moved = folder.parent / "moved"
    os.utime(moved / "a.txt", (1, 1))
    (folder.parent / "link").symlink_to(moved, target_is_directory=True)
    assert difference(before, identity_of(moved)) == difference(before, identity_of(folder.parent / "link")) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "b.txt").write_text("text of B.txt"), "other content in b.txt"),
        (lambda f: (f / "sub" / "c.txt").write_text("text of c.txt and more"), "other content in sub/c.txt"),
        (lambda f: (f / "d.txt").write_text("one more"), "new d.txt"),
        (lambda f: (f / "b.txt").unlink(), "gone b.txt"),
        (lambda f: (f / "b.txt").rename(f / "z.txt"), "another order"),
    ],
)
def test_a_changed_file_is_named(folder, change, said):
    before = identity_of(folder)
    change(folder)
    message = difference(before, identity_of(folder))
    assert message.startswith("data source the source has changed: ") and said in message


def test_many_and_large_files_cost_a_bounded_number_of_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(data_identity, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(data_identity, "_BLOCKS", 40)
    monkeypatch.setattr(data_identity, "_FILES", 10)
    monkeypatch.setattr(data_identity, "_GROUPS", 4)
    monkeypatch.setattr(file_bytes, "_SAMPLE_BYTES", 16)
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d} " * 400)
    source, reads = open_source(SourceConfig(path=str(tmp_path))), []
    read_at = file_bytes.read_at
    monkeypatch.setattr(file_bytes, "read_at", lambda *args: reads.append(args) or read_at(*args))
    before = data_identity.source_identity(source)
    assert len(reads) == 10 * 3 and len(before["files"]) == 4
    (tmp_path / "29.txt").write_text("29 " * 399 + "28 ")  # the end of a file is always read
    message = difference(before, data_identity.source_identity(source))
    assert "at or after 24.txt" in message
    (tmp_path / "11.txt").write_text("longer " * 400)  # and so is every size
    assert "at or after 08.txt" in difference(before, data_identity.source_identity(source))


def test_rows_are_the_same_data_only_if_every_byte_is(tmp_path, monkeypatch):
    """A file of rows is read whole when it is opened, and so its checksum is of all of it."""
    monkeypatch.setattr(data_identity, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(data_identity, "_BLOCKS", 3)
    monkeypatch.setattr(file_bytes, "_SAMPLE_BYTES", 16)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(500)))
    before = identity_of(path)
    path.write_text(path.read_text().replace("row 123", "row 124"))
    assert "other content in a.jsonl" in difference(before, identity_of(path))


def test_the_named_tokenizer_must_be_that_of_the_run(tmp_path):
    TOKENIZER.save(tmp_path / "one")
    TOKENIZER.save(tmp_path / "moved")
    Tokenizer.train(["other words entirely"] * 3, 300).save(tmp_path / "other")
    used = Tokenizer.load(tmp_path / "one")

    def check(named):
        return data_identity.check_named_tokenizer(str(named), used, tmp_path / "one")

    assert check(tmp_path / "moved") == check(tmp_path / "moved" / "tokenizer.json") == []
    assert data_identity.check_named_tokenizer("", used, tmp_path / "one") == []
    (note,) = check(tmp_path / "nowhere")
    assert "goes on with its own" in note
    with pytest.raises(ConfigError, match="not the tokenizer of this run: the tokenizer has changed"):
        check(tmp_path / "other")


def test_another_version_of_the_library_compares_vocabularies_alone():
    identity = data_identity.tokenizer_identity(TOKENIZER)
    elsewhere = identity | {"library": "0", "rules": "written in another way"}

    def differ(saved):
        return bool(data_identity.differences({"tokenizer": saved}, {"tokenizer": identity}, []))

    assert not differ(elsewhere)
    assert differ(elsewhere | {"library": identity["library"]}) and differ(elsewhere | {"vocabulary": ""})
