"""Files of a data source: compression, formats by content, what is skipped, rows that cannot be read, damage."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.config import SourceConfig
from mmx_jax.data import file_bytes, row_index
from mmx_jax.data.sources import DataError, open_source

TEXTS = [f"document {i} says " + "abc " * (i % 7) for i in range(12)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def lines_of(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstandard(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


def read(path, **options):
    names = ("on_bad_row", "cache_dir")
    source = open_source(
        SourceConfig(path=str(path), **{k: v for k, v in options.items() if k not in names}),
        eos_id=0,
        **{k: v for k, v in options.items() if k in names},
    )
    return [source[i] for i in range(len(source))], source


# -- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(COMPRESSORS))
def test_compressed_rows_and_texts_are_read(tmp_path, suffix, cache):
    compress = COMPRESSORS[suffix]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "0.jsonl").write_bytes(lines_of(TEXTS[:3]))
    # Several members, one after another, are one file, as `cat a.gz b.gz` makes them.
    members = compress(lines_of(TEXTS[3:5])) + compress(lines_of(TEXTS[5:]))
    (tmp_path / "rows" / f"1.jsonl{suffix}").write_bytes(members)
    documents, source = read(tmp_path / "rows")
    assert documents == TEXTS
    assert any("1 compressed files" in note and str(cache) in note for note in source.notes)
    copies = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if path.is_file()}
    assert len(copies) == 1 and read(tmp_path / "rows")[0] == TEXTS
    assert copies == {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if path.is_file()}

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("plain")
    (tmp_path / "texts" / f"1.txt{suffix}").write_bytes(compress(b"packed"))
    assert read(tmp_path / "texts")[0] == ["plain", "packed"]
    assert read(tmp_path / "texts" / f"1.txt{suffix}")[0] == ["packed"]


def test_compression_goes_by_content_not_by_name(tmp_path):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(lines_of(TEXTS)))
    (tmp_path / "plain.jsonl.gz").write_bytes(lines_of(TEXTS))
    assert read(tmp_path / "packed.jsonl")[0] == read(tmp_path / "plain.jsonl.gz")[0] == TEXTS


@pytest.mark.parametrize("suffix", sorted(COMPRESSORS))
def test_damaged_compressed_files_are_named_and_leave_no_copy(tmp_path, suffix, cache):
    data = COMPRESSORS[suffix](lines_of([text * 50 for text in TEXTS]) + os.urandom(5000))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} cannot be decompressed .*damaged or cut off"):
        read(tmp_path / f"a.jsonl{suffix}", format="jsonl")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_cache_without_room_names_the_field(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS)))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is compressed.*data\.reading\.cache_dir"):
        read(tmp_path / "a.jsonl.gz", cache_dir=str(tmp_path / "file" / "cache"))


def test_a_changed_compressed_file_is_not_read_from_an_old_copy(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines_of(TEXTS), 0))
    assert read(path)[0] == TEXTS
    path.write_bytes(gzip.compress(lines_of([text.upper() for text in TEXTS]), 0))
    assert read(path)[0] == [text.upper() for text in TEXTS]


# -- what a folder holds ----------------------------------------------------------------------------------------------


def test_files_skipped_are_counted_by_suffix_with_an_example(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(lines_of(TEXTS))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    for name in ("README.md", "sub/a.png", "sub/b.png", ".hidden", "x.png.gz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "sub", target_is_directory=True)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    documents, source = read(tmp_path)
    (note,) = source.notes
    assert documents == TEXTS and "1 files are read, 8 are skipped" in note
    for part in ("1 .md (as README.md)", "2 .png (as sub/", "1 hidden", "1 .gz", "1 empty", "1 links to", "1 broken"):
        assert part in note, note


def test_a_whole_folder_needs_no_note(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(lines_of(TEXTS))
    assert read(tmp_path)[1].notes == []


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a", "a.JSONL", "a.ndjson", "a.json.gz"])
def test_json_lines_are_known_by_content(tmp_path, name):
    data = lines_of(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    documents, source = read(tmp_path / name)
    assert documents == TEXTS
    if name in ("a.json", "a.txt", "a"):
        assert any("read as jsonl" in note for note in source.notes)
        as_text, _ = read(tmp_path / name, format="text")
        assert "".join(as_text).encode() == data
    if name != "a":
        assert read(tmp_path)[0] == TEXTS  # the folder


def test_text_that_only_looks_like_rows_stays_text(tmp_path):
    settings_file = '{"a": 1,\n "text": [1, 2]}\n'
    (tmp_path / "package.json").write_text(settings_file)
    (tmp_path / "list.json").write_text("[1, 2, 3]")
    (tmp_path / "code.py").write_text("x = {'text': 1}\n" * 20)
    assert read(tmp_path / "package.json")[0] == [settings_file]
    assert len(read(tmp_path)[0]) == 3
    (tmp_path / "some.json").write_bytes(lines_of(["a"]))
    assert len(read(tmp_path)[0]) == 4


def test_a_json_array_of_rows_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    for path in (tmp_path, tmp_path / "rows.json"):
        with pytest.raises(DataError, match=r"rows\.json is one JSON array.*jq -c"):
            read(path)
    assert read(tmp_path / "rows.json", format="text")[0]


def test_binary_formats_are_known_by_content(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.txt")
    np.save(tmp_path / "tokens.npy", np.array([5, 0, 6, 0]))
    os.rename(tmp_path / "tokens.npy", tmp_path / "tokens.bin")
    assert read(tmp_path / "rows.txt")[0] == TEXTS
    assert [document.tolist() for document in read(tmp_path / "tokens.bin")[0]] == [[5, 0], [6, 0]]
    (tmp_path / "utf16.txt").write_bytes("plain words".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"utf16\.txt is no text.*NUL"):
        read(tmp_path / "utf16.txt")
    (tmp_path / "utf16.jsonl").write_bytes(lines_of(TEXTS).decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"utf16\.jsonl is UTF-16.*iconv"):
        read(tmp_path / "utf16.jsonl")


# -- rows -------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([b'{"a"', b" ", b"\t", b"\r", b"\n", b"\n\n", b"\xe2\x80\xa8", b"\\", b"x"]), max_size=40),
    st.booleans(),
    st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_row_index_finds_the_lines_that_a_split_finds(tmp_path_factory, parts, marked, block):
    body, mark = b"".join(parts), b"\xef\xbb\xbf" if marked else b""
    path = tmp_path_factory.getbasetemp() / "index.jsonl"
    path.write_bytes(mark + body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_bytes, "_BLOCK_BYTES", block)
        index = row_index.index_rows(path)
    expected = [(n + 1, line.strip()) for n, line in enumerate(body.split(b"\n")) if line.strip()]
    found = [
        (index.line_number(i), (mark + body)[index.starts[i] : index.starts[i + 1]].strip()) for i in range(len(index))
    ]
    assert found == expected


PAIR, LITERAL = r"\ud83d\ude00", r"\\ud83d"


@given(st.lists(st.sampled_from([r"\ud83d", r"\uDE00", PAIR, LITERAL, "a", "\n"]), max_size=30), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_row_with_half_a_surrogate_pair_is_suspected(tmp_path_factory, parts, block):
    rows = [f'{{"text": "{text}"}}' for text in "".join(parts).split("\n")]
    path = tmp_path_factory.getbasetemp() / "surrogates.jsonl"
    path.write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_bytes, "_BLOCK_BYTES", block)
        suspects = set(row_index.index_rows(path).suspects)

    def is_text(row):
        try:
            json.loads(row)["text"].encode()
        except UnicodeEncodeError:
            return False
        return True

    bad = {i for i, row in enumerate(rows) if not is_text(row)}
    assert bad <= suspects
    assert len(suspects - bad) == 0 or block < 1000


def test_odd_but_legal_lines_are_read(tmp_path):
    rows = [json.dumps({"text": text}) for text in ("one", "two", "three")]
    data = "\ufeff" + rows[0] + "\r\n\r\n   \n\n" + rows[1] + "\n" + '{"text": "a\u2028b \\ud83d\\ude00"}\n' + rows[2]
    (tmp_path / "a.jsonl").write_bytes(data.encode())
    assert read(tmp_path / "a.jsonl")[0] == ["one", "two", "a\u2028b 😀", "three"]
    (tmp_path / "a.txt").write_bytes("\ufefftext".encode())
    assert read(tmp_path / "a.txt")[0] == ["text"]


BAD_ROWS = {
    "not JSON": b'{"text": ',
    "nested too deeply": b'{"text": ' + b"[" * 100_000,
    "is not JSON": b'{"text": ' + b"1" * 5000 + b"}",
    "has no field 'text'": b'{"content": "x"}',
    "holds a int, not text": b'{"text": 5}',
    "JSON list, not an object": b"[1]",
    "half of a surrogate pair": rb'{"text": "bad \ud83d"}',
    "is not UTF-8": b'{"text": "\xff"}',
    "is not JSON:": b"\0\0\0\0",
}


@pytest.mark.parametrize("message", sorted(BAD_ROWS))
def test_a_bad_row_is_named_when_opened_or_skipped(tmp_path, message):
    data = lines_of(TEXTS[:4]) + b"\n" + BAD_ROWS[message] + b"\n" + lines_of(TEXTS[4:])
    (tmp_path / "a.jsonl").write_bytes(data)
    place = rf"line 6 \(at byte {len(lines_of(TEXTS[:4])) + 1}\) of .*a\.jsonl"
    with pytest.raises(DataError, match=rf"{place}.*on_bad_row=skip") as error:
        read(tmp_path / "a.jsonl")
    assert message in str(error.value)
    documents, source = read(tmp_path / "a.jsonl", on_bad_row="skip")
    assert documents == [*TEXTS[:4], "", *TEXTS[4:]]
    documents = [source[i] for i in range(len(source))]  # an epoch later it is the same row
    (line,) = source.summary()
    assert "1 bad rows were skipped" in line and message in line


def test_half_a_surrogate_pair_is_found_when_a_large_file_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("mmx_jax.data.sources._READ_THROUGH_DOCUMENTS", 5)
    rows = lines_of(TEXTS) + rb'{"text": "literal \\ud83d and \ud83d\ude00"}' + b"\n"
    (tmp_path / "a.jsonl").write_bytes(rows)
    assert read(tmp_path / "a.jsonl")[0][-1] == "literal \\ud83d and 😀"
    (tmp_path / "a.jsonl").write_bytes(rows + rb'{"text": "bad \udfff"}')
    with pytest.raises(DataError, match=r"line 14 .*a\.jsonl.*half of a surrogate pair"):
        open_source(SourceConfig(path=str(tmp_path / "a.jsonl")))


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"x\ny\n")
    with pytest.raises(DataError, match=r"all of its 2 rows are bad, the first: line 1 "):
        read(tmp_path / "a.jsonl", on_bad_row="skip")


@pytest.mark.parametrize("value", [[[1], [2, 3]], [1.5], ["a"], {"a": 1}, None, [2**70], [2**63]])
def test_tokens_that_are_none_are_bad_rows(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": [1]}) + "\n" + json.dumps({"tokens": value}))
    with pytest.raises(DataError, match=r"line 2 .*a\.jsonl"):
        read(tmp_path / "a.jsonl", format="tokens")
    documents, source = read(tmp_path / "a.jsonl", format="tokens", on_bad_row="skip")
    assert len(documents[1]) == 0 and len(source.bad_rows) == 1


def test_bad_rows_of_parquet_and_text_files(tmp_path):
    binary = pa.array([b"good", b"\xff bad", None], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1 of row group 0 of .*a\.parquet is not UTF-8"):
        read(tmp_path / "a.parquet")
    documents, source = read(tmp_path / "a.parquet", on_bad_row="skip")
    assert documents == ["good", "", ""] and len(source.bad_rows) == 2
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("good")
    (tmp_path / "texts" / "b.txt").write_bytes(b"\xff bad")
    assert read(tmp_path / "texts", on_bad_row="skip")[0] == ["good", ""]


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npy", "jsonl"])
def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path, suffix):
    """Under a memory map the process would end with SIGBUS."""
    path = tmp_path / f"t.{suffix}"
    if suffix == "npy":
        np.save(path, np.tile(np.array([5, 6, 0], np.uint16), 50_000))
    else:
        path.write_bytes(lines_of(TEXTS))
    source = open_source(SourceConfig(path=str(path)), eos_id=0)
    os.truncate(path, 200)
    with pytest.raises(DataError, match=rf"t\.{suffix} has become shorter"):
        source[len(source) - 1]
    path.unlink()
    with pytest.raises(DataError, match=rf"t\.{suffix} cannot be read"):
        source[0]


def test_large_token_files_are_cut_at_eos_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("mmx_jax.data.sources._TOKENS_AT_ONCE", 4)
    tokens = np.random.default_rng(0).integers(0, 3, 101).astype(">i2")
    np.save(tmp_path / "t.npy", tokens)
    documents = [document.tolist() for document in read(tmp_path / "t.npy")[0]]
    assert sum(documents, []) == tokens.tolist()
    assert all(document[-1] == 0 and 0 not in document[:-1] for document in documents[:-1])


@given(st.binary(max_size=200), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_damaged_binary_files_are_data_errors(tmp_path_factory, noise, kind):
    folder = tmp_path_factory.getbasetemp()
    suffix = ("parquet", "npy", "jsonl", "txt")[kind]
    path = folder / f"noise.{suffix}"
    head = {"parquet": b"PAR1", "npy": b"\x93NUMPY\x01\x00"}.get(suffix, b"")
    path.write_bytes(head + noise + (b"PAR1" if suffix == "parquet" else b""))
    try:
        read(path)
    except DataError as error:
        assert path.name in str(error)
