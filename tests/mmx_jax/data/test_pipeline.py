"""The data pipeline: packing by property, sources and their errors, split, mixture, resume to the bit."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.config import DataConfig, ReadingConfig, SourceConfig
from mmx_jax.data.packing import PackingSpec, batches_of, pack, split_document
from mmx_jax.data.pipeline import (
    content_hash,
    corpus_statistics,
    groups_of_rows,
    iterate_texts,
    make_eval_batches,
    make_split,
    make_train_iterator,
    merge_states,
    open_corpus,
    open_sources,
)
from mmx_jax.data.sources import DataError, cut_text, open_source, standard_library
from mmx_jax.data.tokenizer import Tokenizer
from tests.support.paths import REPOSITORY

AT_ONCE = ReadingConfig(prefetch=0)

TEXTS = [f"document {i} says " + "abc " * (i % 17) + f"end {i}" for i in range(60)]
TOKENIZER = Tokenizer.train(TEXTS, 300)
NAMES = ("tokens", "targets", "segment_ids", "positions")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_arrayrecord(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


WRITERS = {"jsonl": write_jsonl, "array_record": write_arrayrecord, "parquet": write_parquet}


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    return DataConfig(sources=(SourceConfig(path=str(tmp_path / "texts.jsonl")),), packing_bins=4, eval_fraction=0.2)


def iterator_of(data, **kwargs):
    return make_train_iterator(data, TOKENIZER, **({"sequence_length": 32, "rows": 3} | kwargs))


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def segments(batch):
    """(tokens, targets, start) of every segment, row by row; checks ids and positions on the way."""
    for row in range(len(batch["tokens"])):
        tokens, targets, ids, positions = (batch[name][row] for name in NAMES)
        for segment in range(1, ids.max() + 1):
            where = np.flatnonzero(ids == segment)
            start = where[0]
            np.testing.assert_array_equal(where, np.arange(start, start + len(where)))
            np.testing.assert_array_equal(positions[where], np.arange(len(where)))
            yield tokens[where], targets[where], start


def assert_batches_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(a[name], b[name])


# -- packing ----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    length=st.integers(1, 24),
    bins=st.integers(1, 5),
    alignment=st.sampled_from([1, 2, 4, 7]),
    shuffle=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_token_once(lengths, length, bins, alignment, shuffle):
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]  # all distinct
    pieces = [piece for document in documents for piece in split_document(document, length)]
    dataset = grain.MapDataset.source(pieces).to_iter_dataset(grain.ReadOptions(0, 0))
    spec = PackingSpec(length=length, bins=bins, alignment=alignment, pad_id=999)
    rows = list(pack(grain, dataset, spec, seed=1, shuffle=shuffle))
    batch = {name: np.stack([row[name] for row in rows]) for name in NAMES}
    last_of_document = set((ends - 1).tolist())
    seen, piece_starts = [], {piece["tokens"][0]: len(piece["tokens"]) for piece in pieces}
    for tokens, targets, start in segments(batch):
        assert start % alignment == 0
        assert piece_starts[tokens[0]] == len(tokens)  # a segment is a piece, whole and in order
        np.testing.assert_array_equal(tokens, tokens[0] + np.arange(len(tokens)))
        expected = [-1 if token in last_of_document else token + 1 for token in tokens.tolist()]
        np.testing.assert_array_equal(targets, expected)
        seen += tokens.tolist()
    assert sorted(seen) == list(range(sum(lengths)))
    padding = batch["segment_ids"] == 0
    assert batch["tokens"].shape[1] == length
    assert (batch["tokens"][padding] == 999).all() and (batch["targets"][padding] == -1).all()
    assert (batch["positions"][padding] == 0).all()
    assert all(array.dtype == np.int32 for array in batch.values())


def test_packing_is_first_fit():
    pieces = [piece for n in (5, 6, 3, 2, 4) for piece in split_document(np.full(n, n, np.int32), 8)]
    dataset = grain.MapDataset.source(pieces).to_iter_dataset(grain.ReadOptions(0, 0))
    spec = PackingSpec(length=8, bins=3, alignment=1, pad_id=0)
    rows = list(pack(grain, dataset, spec, seed=0, shuffle=False))
    assert [row["tokens"].tolist() for row in rows] == [
        [5, 5, 5, 5, 5, 3, 3, 3],
        [6, 6, 6, 6, 6, 6, 2, 2],
        [4, 4, 4, 4, 0, 0, 0, 0],
    ]


def test_last_batch_is_filled_with_padding():
    row = dict(zip(NAMES, np.ones((4, 5), np.int32), strict=True))
    batches = list(batches_of([row] * 3, 2, pad_id=7))
    assert [batch["tokens"].shape for batch in batches] == [(2, 5), (2, 5)]
    assert [batches[1][name][1, 0] for name in NAMES] == [7, -1, 0, 0]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_batches_hold_the_training_documents(corpus):
    """One epoch of rows long enough for any document gives back the train split, each with its eos."""
    split = make_split(open_sources(corpus), corpus.eval_fraction)
    train = {text for text in TEXTS if split.is_train(text)}
    assert 0 < len(train) < len(TEXTS)
    seen = []
    iterator = iterator_of(corpus, sequence_length=128)
    while len(seen) < len(train):
        for tokens, targets, _ in segments(next(iterator)):
            assert tokens[-1] == TOKENIZER.eos_id and targets[-1] == -1
            np.testing.assert_array_equal(targets[:-1], tokens[1:])
            seen.append(TOKENIZER.decode(tokens))
    iterator.close()
    assert set(seen) <= train
    assert seen != sorted(seen, key=TEXTS.index)  # shuffled


def test_resume_is_bit_exact(corpus, tmp_path):
    iterator = iterator_of(corpus)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)
    fresh = iterator_of(corpus)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_batches_equal(take(fresh, 5), expected)
    fresh.set_state(state)  # and again, with the thread running
    assert_batches_equal(take(fresh, 5), expected)
    fresh.close()
    iterator.close()

    TOKENIZER.save(tmp_path / "tokenizer")
    (tmp_path / "state.json").write_text(json.dumps(state))
    script = f"""
import json, numpy as np
from mmx_jax.config import DataConfig, SourceConfig
from mmx_jax.data.pipeline import make_train_iterator
from mmx_jax.data.tokenizer import Tokenizer
data = DataConfig(sources=(SourceConfig(path={corpus.sources[0].path!r}),), packing_bins=4, eval_fraction=0.2)
iterator = make_train_iterator(data, Tokenizer.load({str(tmp_path / "tokenizer")!r}), sequence_length=32, rows=3)
iterator.set_state(json.load(open({str(tmp_path / "state.json")!r})))
batches = [next(iterator) for _ in range(5)]
iterator.close()
np.savez({str(tmp_path / "batches.npz")!r}, **{{f"{{i}}{{k}}": v for i, b in enumerate(batches) for k, v in b.items()}})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with np.load(tmp_path / "batches.npz") as saved:
        assert_batches_equal([{name: saved[f"{i}{name}"] for name in NAMES} for i in range(5)], expected)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6])
def test_resume_at_every_step_of_a_mixture(corpus, tmp_path, steps):
    write_parquet(tmp_path / "more.parquet", [{"text": text[::-1]} for text in TEXTS])
    sources = (*corpus.sources, SourceConfig(path=str(tmp_path / "more.parquet"), weight=0.5))
    data = DataConfig(sources=sources, packing_bins=2, packing_alignment=8, shuffle_buffer=5, reading=AT_ONCE)
    iterator = iterator_of(data, rows=2)
    take(iterator, steps)
    state = iterator.get_state()
    expected = take(iterator, 6)
    fresh = iterator_of(data, rows=2)
    fresh.set_state(state)
    assert_batches_equal(take(fresh, 6), expected)


@pytest.mark.parametrize("rows, shards, counts", [(16, 8, (2, 4, 8)), (4, 8, (2, 4)), (12, 8, (2, 4)), (3, 9, (3,))])
def test_any_number_of_processes_reads_the_same_batches_and_goes_on_with_another(
    corpus, tmp_path, rows, shards, counts
):
    write_jsonl(tmp_path / "more.jsonl", [{"text": text[::-1]} for text in TEXTS])
    sources = (*corpus.sources, SourceConfig(path=str(tmp_path / "more.jsonl"), weight=0.5))
    data = DataConfig(sources=sources, packing_bins=2, shards=shards, reading=AT_ONCE)

    def iterators(count):
        parts = np.split(np.arange(rows), count)
        return [iterator_of(data, rows=rows, own_rows=part.tolist()) for part in parts]

    def joined(parts, n):
        batches = [[next(part) for part in parts] for _ in range(n)]
        return [{name: np.concatenate([batch[name] for batch in group]) for name in NAMES} for group in batches]

    def state_of(parts):
        return json.loads(json.dumps(merge_states([part.get_state() for part in parts])))

    whole = iterators(1)
    expected = joined(whole, 5)
    for count in counts:
        parts = iterators(count)
        assert_batches_equal(joined(parts, 3), expected[:3])
        saved = state_of(parts)
        for other in (1, *counts):
            parts = iterators(other)
            for part in parts:
                part.set_state(saved)
            assert_batches_equal(joined(parts, 2), expected[3:])
            assert state_of(parts) == state_of(whole)


def test_groups_of_rows():
    assert groups_of_rows(16, 8, range(16)) == {group: [group] for group in range(8)}
    assert groups_of_rows(16, 8, range(4, 8)) == {2: [2], 3: [3]}
    assert groups_of_rows(2, 8, [1]) == {1: [4, 5, 6, 7]}
    assert groups_of_rows(12, 8, [0, 2, 11]) == {0: [0, 1], 3: [6, 7]}


@pytest.mark.parametrize("own", [[5], [0, 1, 3, 8, 9, 11], [2, 3, 4, 5], list(range(12))])
def test_any_rows_of_the_batches_can_be_read_and_the_position_is_the_same(corpus, own):
    """Whole groups of shards or not, next to each other or not: a mesh may have it so."""
    data = DataConfig(**{**vars(corpus), "reading": AT_ONCE})
    whole, part = iterator_of(data, rows=12), iterator_of(data, rows=12, own_rows=own)
    before, after = (take(iterator, 3) for iterator in (whole, part))
    assert_batches_equal([{name: batch[name][own] for name in NAMES} for batch in before], after)
    states = whole.get_state(), part.get_state()
    assert states[1]["shards"].items() <= states[0]["shards"].items()
    assert merge_states(states) == merge_states(states[::-1]) == states[0]
    fresh = iterator_of(data, rows=12, own_rows=own)
    fresh.set_state(json.loads(json.dumps(states[0])))
    following = next(whole)
    assert_batches_equal([{name: following[name][own] for name in NAMES}], [next(fresh)])


def test_processes_that_read_different_data_are_refused(corpus, tmp_path):
    write_jsonl(tmp_path / "fewer.jsonl", [{"text": text} for text in TEXTS[:-1]])
    here, there = (iterator_of(corpus, rows=8, own_rows=rows) for rows in ([0, 1], [1, 2]))
    merge_states([here.get_state(), there.get_state()])
    next(there)
    with pytest.raises(
        DataError, match="processes 0 and 1 both read shard 1 of the data and are not at the same place"
    ):
        merge_states([here.get_state(), there.get_state()])
    other = DataConfig(**{**vars(corpus), "sources": (SourceConfig(path=str(tmp_path / "fewer.jsonl")),)})
    states = [iterator_of(data, rows=8).get_state() for data in (corpus, other)]
    with pytest.raises(
        DataError, match=r"of process 1 are not those of process 0: data source 0 has changed: .*60 documents, .* 59"
    ):
        merge_states(states)


def test_position_of_other_data_is_refused(corpus):
    state = iterator_of(corpus).get_state()
    with pytest.raises(DataError, match="sequence_length was 32 and is 16; seed was 0 and is 3"):
        iterator_of(corpus, sequence_length=16, seed=3).set_state(state)


def test_the_same_content_elsewhere_is_the_same_data(corpus, tmp_path, monkeypatch):
    """By another name of its folder, through a link, with another time; then with one letter changed."""
    iterator = iterator_of(corpus)
    take(iterator, 2)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 2)
    iterator.close()
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "t.jsonl"
    (tmp_path / "texts.jsonl").rename(moved)
    os.utime(moved, (1, 1))
    (tmp_path / "link.jsonl").symlink_to(moved)
    monkeypatch.chdir(moved.parent)
    for path in (moved, tmp_path / "link.jsonl", "t.jsonl", "../elsewhere/t.jsonl"):
        fresh = iterator_of(dataclasses.replace(corpus, sources=(SourceConfig(path=str(path)),)))
        fresh.set_state(state)
        assert fresh.notes == []
        assert_batches_equal(take(fresh, 2), expected)
        fresh.close()
    moved.write_text(moved.read_text().replace("end 7", "end 8"))
    fresh = iterator_of(dataclasses.replace(corpus, sources=(SourceConfig(path=str(moved)),), reading=AT_ONCE))
    with pytest.raises(DataError, match=r"data source .*t\.jsonl has changed: .*60 documents.*start a new run"):
        fresh.set_state(state)


def test_a_position_of_another_tokenizer_is_refused_and_one_of_an_older_version_taken_with_a_note(corpus):
    data = dataclasses.replace(corpus, reading=AT_ONCE)
    state = iterator_of(data).get_state()
    other = Tokenizer.train([text[::-1] for text in TEXTS], 300)
    assert other.vocab_size == TOKENIZER.vocab_size
    with pytest.raises(DataError, match="the tokenizer has changed"):
        make_train_iterator(data, other, sequence_length=32, rows=3).set_state(state)
    older = state["identity"] | {"sources": [["/where/it/was", len(TEXTS)]]}
    del older["tokenizer"]
    iterator = iterator_of(data)
    iterator.set_state(state | {"identity": older})
    assert len(iterator.notes) == 1 and "by content from now on" in iterator.notes[0]
    assert iterator.get_state() == state
    with pytest.raises(DataError, match="held 61 documents and holds 60"):
        iterator.set_state(state | {"identity": older | {"sources": [["/where/it/was", 61]]}})


def test_documents_of_which_nothing_is_left_are_skipped_and_counted(tmp_path):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.normalizer = tokenizers.normalizers.Strip()
    tokenizer = Tokenizer(backend, TOKENIZER.config)
    rows = [{"text": " " * (i + 1)} for i in range(20)]
    write_jsonl(tmp_path / "t.jsonl", rows)
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "t.jsonl")),), eval_fraction=0, reading=AT_ONCE)
    for opened in (make_train_iterator, make_eval_batches):
        options = {} if opened is make_train_iterator else {"batches": 1}
        part = dataclasses.replace(data, eval_fraction=0 if opened is make_train_iterator else 0.2)
        with pytest.raises(DataError, match=r"t\.jsonl has nothing to train on: .*tokenizer makes no token"):
            opened(part, tokenizer, sequence_length=8, rows=2, **options)
    write_jsonl(tmp_path / "t.jsonl", [*rows, {"text": "a word"}])
    corpus = open_corpus(data, tokenizer)
    batch = next(make_train_iterator(corpus, tokenizer, sequence_length=8, rows=2))
    assert {tokenizer.decode(tokens) for tokens, _, _ in segments(batch)} == {"a word"}
    assert corpus_statistics(corpus, tokenizer).documents == 1
    assert "20 documents were skipped" in corpus.skipped[0]


def test_an_evaluation_share_that_holds_nothing_is_refused_with_the_remedy(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(2100)])
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "t.jsonl")),), eval_fraction=1e-9)
    with pytest.raises(DataError, match=r"eval_fraction=1e-09 holds out none of the 2,100 documents.*0 for no evalu"):
        make_eval_batches(data, TOKENIZER, sequence_length=32, rows=1, batches=1)


def test_content_after_many_empty_documents_is_found(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"text": ""}] * 2050 + [{"text": "late"}])
    sources = (SourceConfig(path=str(tmp_path / "t.jsonl")),)
    data = DataConfig(sources=sources, eval_fraction=0, shards=1, packing_bins=1, reading=AT_ONCE)
    assert texts_of([next(iterator_of(data, rows=1))])[0] == "late"


def test_prefetch_changes_nothing_and_seeds_and_epochs_differ(corpus):
    ahead = iterator_of(corpus)
    plain = iterator_of(DataConfig(**{**vars(corpus), "reading": AT_ONCE}))
    expected = take(plain, 8)
    assert_batches_equal(take(ahead, 8), expected)
    ahead.close()
    other = next(iterator_of(corpus, seed=1))
    assert not np.array_equal(other["tokens"], expected[0]["tokens"])


def test_mixture_weights_are_shares_of_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "aaaa " * (5 + i % 30)} for i in range(200)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b" * (1 + i % 5)} for i in range(200)])  # far fewer tokens
    sources = tuple(SourceConfig(path=str(tmp_path / f"{name}.jsonl"), weight=3.0) for name in "ab")
    data = DataConfig(sources=sources, eval_fraction=0, packing_bins=4, reading=AT_ONCE)

    def share_of_a(**kwargs):
        batches = take(iterator_of(data, rows=5, **kwargs), 80)
        return np.mean(["b" not in TOKENIZER.decode(row) for batch in batches for row in batch["tokens"]])

    assert share_of_a() == pytest.approx(0.5, abs=0.01)
    assert share_of_a(source_weights=(3, 1)) == pytest.approx(0.75, abs=0.01)
    for batch in take(iterator_of(data, rows=8, source_weights=(3, 1)), 20):  # and of the rows of each batch
        assert sum("b" not in TOKENIZER.decode(row) for row in batch["tokens"]) == 6
    with pytest.raises(DataError, match="source_weights"):
        iterator_of(data, source_weights=(1,))


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_shards_read_disjoint_documents_and_all_of_them(tmp_path, shuffle_buffer):
    write_jsonl(tmp_path / "t.jsonl", [{"text": f"{i:05d}"} for i in range(64)])
    source = SourceConfig(path=str(tmp_path / "t.jsonl"))
    data = DataConfig(
        sources=(source,), eval_fraction=0, packing_bins=1, shuffle_buffer=shuffle_buffer, shards=2, reading=AT_ONCE
    )
    read = []
    for index in range(2):
        iterator, documents = iterator_of(data, rows=2, own_rows=[index]), []
        while len(documents) < 32:
            documents += [TOKENIZER.decode(tokens) for tokens, _, _ in segments(next(iterator))]
        read.append(documents[:32])
    # Bins are emitted in order with packing_bins=1, so the first 32 documents are this shard's half of an epoch.
    assert len(set(read[0])) == len(set(read[1])) == 32
    assert not set(read[0]) & set(read[1])


def test_long_documents_are_cut_into_segments(tmp_path):
    tokens = np.arange(4, 104)
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": tokens.tolist()}])
    source = SourceConfig(path=str(tmp_path / "t.jsonl"), format="tokens")
    batch = next(iterator_of(DataConfig(sources=(source,), eval_fraction=0, packing_bins=4, shards=1), rows=4))
    pieces = sorted((int(t[0]), t, y) for t, y, _ in segments(batch) if t[0] != TOKENIZER.eos_id)
    whole = np.append(tokens, TOKENIZER.eos_id)
    np.testing.assert_array_equal(pieces[0][1], whole[:32])
    np.testing.assert_array_equal(pieces[0][2], whole[1:33])
    np.testing.assert_array_equal(pieces[3][1][:4], whole[96:100])


# -- held-out documents and statistics --------------------------------------------------------------------------------


def texts_of(batches):
    return [TOKENIZER.decode(tokens) for batch in batches for tokens, _, _ in segments(batch)]


def test_held_out_documents_are_the_rest(corpus):
    split = make_split(open_sources(corpus), corpus.eval_fraction)
    batches = make_eval_batches(corpus, TOKENIZER, sequence_length=128, rows=3, batches=50)
    assert sorted(texts_of(batches)) == sorted(text for text in TEXTS if split.is_held_out(text))
    assert all(batch[name].shape == (3, 128) for batch in batches for name in NAMES)
    again = make_eval_batches(corpus, TOKENIZER, sequence_length=128, rows=3, batches=50)
    assert_batches_equal(batches, again)
    assert len(make_eval_batches(corpus, TOKENIZER, sequence_length=32, rows=3, batches=1)) == 1


def test_processes_evaluate_their_rows_of_the_same_batches(corpus):
    options = dict(sequence_length=128, batches=4, rows=3)
    whole = make_eval_batches(corpus, TOKENIZER, **options)
    for own in ([0], [0, 2], [1, 2]):
        part = make_eval_batches(corpus, TOKENIZER, own_rows=own, **options)
        assert_batches_equal(part, [{name: batch[name][own] for name in NAMES} for batch in whole])


def test_split_goes_by_content_not_place():
    train = make_split([TEXTS_SOURCE], 0.2).is_train
    reordered = make_split([ListSource(TEXTS[::-1])], 0.2).is_train
    assert [train(text) for text in TEXTS] == [reordered(text) for text in TEXTS]
    hashes = [content_hash(f"{i}") for i in range(4000)]
    assert np.mean(np.array(hashes) < 0.1) == pytest.approx(0.1, abs=0.02)
    assert content_hash(np.array([1, 2], np.int32)) == content_hash(np.array([1, 2], np.int64))


class ListSource(list):
    name = "a list"


TEXTS_SOURCE = ListSource(TEXTS)


def test_small_corpus_still_holds_something_out():
    split = make_split([ListSource(["one", "two", "two"])], 1e-6)
    assert sum(map(split.is_held_out, ["one", "two"])) == 1
    with pytest.raises(DataError, match="1 different documents.*eval_fraction"):
        make_split([ListSource(["one", "one"])], 0.5)
    with pytest.raises(DataError, match="empty"):
        make_split([ListSource(["", ""])], 0.0)
    assert not make_split([ListSource(["one"])], 0.0).is_held_out("one")


def test_evaluation_without_held_out_documents_is_refused(corpus):
    data = DataConfig(**{**vars(corpus), "eval_fraction": 0.0})
    with pytest.raises(DataError, match="eval_fraction is 0"):
        make_eval_batches(data, TOKENIZER, sequence_length=32, rows=1, batches=1)


def test_corpus_statistics(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": [10, 11, 12] * (i + 1)} for i in range(3)])
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "t.jsonl"), format="tokens"),), eval_fraction=0)
    statistics = corpus_statistics(data, TOKENIZER)
    p = np.array([6, 6, 6, 3]) / 21  # three documents, each with its eos
    assert statistics.unigram_entropy == pytest.approx(-(p * np.log(p)).sum())
    assert (statistics.tokens, statistics.documents) == (21, 3)
    assert corpus_statistics(data, TOKENIZER, max_documents=2).documents == 2


def test_texts_for_a_tokenizer_are_training_texts_by_weight(corpus, tmp_path):
    split = make_split(open_sources(corpus), corpus.eval_fraction)
    assert sorted(iterate_texts(corpus)) == sorted(text for text in TEXTS if split.is_train(text))
    write_jsonl(tmp_path / "x.jsonl", [{"text": f"x{i:02d}" + "x" * 97} for i in range(100)])
    more = (*corpus.sources, SourceConfig(path=str(tmp_path / "x.jsonl"), weight=3.0))
    texts = list(iterate_texts(DataConfig(sources=more), max_characters=2000))
    assert sum(len(text) for text in texts if text.startswith("x")) == 1500
    assert texts == list(iterate_texts(DataConfig(sources=more), max_characters=2000))
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": [1, 2]}, {"tokens": [3]}])
    tokenised = DataConfig(sources=(SourceConfig(path=str(tmp_path / "t.jsonl"), format="tokens"),))
    with pytest.raises(DataError, match=r"set data\.tokenizer"):
        list(iterate_texts(tokenised))


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", sorted(WRITERS))
@pytest.mark.parametrize("tokens", [False, True])
def test_row_formats_give_their_documents(tmp_path, suffix, tokens):
    values = [[1, 2, i] for i in range(20)] if tokens else TEXTS
    rows = [{"id": i, "tokens" if tokens else "text": value} for i, value in enumerate(values)]
    WRITERS[suffix](tmp_path / f"1.{suffix}", rows[:13])
    WRITERS[suffix](tmp_path / f"2.{suffix}", rows[13:])
    (tmp_path / "README.md").write_text("about")
    source = open_source(SourceConfig(path=str(tmp_path), format="tokens" if tokens else "auto"))
    assert [list(source[i]) if tokens else source[i] for i in range(len(source))] == values


def test_npy_documents_end_with_eos(tmp_path):
    np.save(tmp_path / "t.npy", np.array([5, 6, 0, 0, 7, 0, 8], np.uint16))
    source = open_source(SourceConfig(path=str(tmp_path / "t.npy")), eos_id=0)
    assert [source[i].tolist() for i in range(len(source))] == [[5, 6, 0], [0], [7, 0], [8]]
    with pytest.raises(DataError, match="eos_token"):
        open_source(SourceConfig(path=str(tmp_path / "t.npy")))
    np.save(tmp_path / "t.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"t\.npy holds float64\[2, 2\]"):
        open_source(SourceConfig(path=str(tmp_path / "t.npy")), eos_id=0)


def test_text_folder_and_text_file(tmp_path):
    (tmp_path / "b.py").write_text("b")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert [source[i] for i in range(len(source))] == ["b", "a"]
    text = "\n\n".join("word " * 500 for _ in range(40))
    (tmp_path / "long.unknown").write_text(text)
    source = open_source(SourceConfig(path=str(tmp_path / "long.unknown")))
    assert len(source) > 5 and "".join(source[i] for i in range(len(source))) == text


@given(st.text("ab\n", max_size=200), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_cut_text_loses_nothing(text, size):
    pieces = cut_text(text, size)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_standard_library_is_the_default():
    source = standard_library()
    assert len(source) > 200
    assert source[0] == standard_library()[0]
    assert not any(part in {"test", "site-packages"} for path in source._paths for part in path.parts[-3:])


def test_errors_name_the_file_and_what_is_wrong(tmp_path):
    def opened(name, **kwargs):
        source = open_source(SourceConfig(path=str(tmp_path / name), **kwargs))
        return [source[i] for i in range(len(source))]

    with pytest.raises(FileNotFoundError, match="absent"):
        opened("absent")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    for name in ("empty.txt", "blank.jsonl"):
        with pytest.raises(DataError, match=f"{name} is empty"):
            opened(name)
    (tmp_path / "data.gz").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(DataError, match=r"data\.gz cannot be decompressed \(gzip\): it is damaged"):
        opened("data.gz")
    (tmp_path / "data.bin").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"data\.bin is not UTF-8 text \(byte 0\).*\.jsonl.*\.parquet"):
        opened("data.bin")
    for suffix, write in WRITERS.items():
        write(tmp_path / f"rows.{suffix}", [{"content": "x", "tokens": [1]}])
        with pytest.raises(DataError, match=rf"rows\.{suffix}.* 'text'.*'content', 'tokens'.*format='tokens'"):
            opened(f"rows.{suffix}")
        with pytest.raises(DataError, match=rf"'content' of .*rows\.{suffix} is not a list of integers"):
            opened(f"rows.{suffix}", format="tokens", tokens_field="content")
        with pytest.raises(DataError, match=rf"'tokens' of .*rows\.{suffix} holds a list, not text"):
            opened(f"rows.{suffix}", text_field="tokens")
    for suffix, kind in (("parquet", "Parquet"), ("array_record", "ArrayRecord"), ("npy", "NumPy")):
        (tmp_path / f"bad.{suffix}").write_bytes(b"not at all" * 99)
        with pytest.raises(DataError, match=rf"bad\.{suffix} is not a readable {kind} file"):
            open_source(SourceConfig(path=str(tmp_path / f"bad.{suffix}")), eos_id=0)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"line 2 \(at byte 14\) of .*bad\.jsonl is not JSON"):
        opened("bad.jsonl")
    with pytest.raises(DataError, match="formats arrayrecord, jsonl, parquet, tokens"):
        opened(".")
    with pytest.raises(DataError, match=r"format='tokens' needs \.npy.*found \.gz"):
        opened("data.gz", format="tokens")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pictures holds no text files; the suffixes in it are \.png"):
        opened("pictures")


def test_damaged_parquet_data_is_an_error(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"{i} {math.sin(i)}" for i in range(5000)]}), path, compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"row group 0 of .*t\.parquet cannot be read"):
        open_source(SourceConfig(path=str(path)))  # a small source is read through


@pytest.mark.parametrize("bad", [-1, TOKENIZER.vocab_size])
def test_tokens_out_of_the_vocabulary_are_refused(tmp_path, bad):
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": [5, bad]}])
    source = SourceConfig(path=str(tmp_path / "t.jsonl"), format="tokens")
    with pytest.raises(DataError, match=rf"t\.jsonl holds token {bad}; the vocabulary has {TOKENIZER.vocab_size}"):
        iterator_of(DataConfig(sources=(source,), eval_fraction=0))
    # Not two rows alone: the shuffle of grain walks through 2^16 numbers for one of them.
    write_jsonl(tmp_path / "t.jsonl", [{"tokens": [5, bad]}, *[{"tokens": [7, 8]}] * 300])
    data = DataConfig(sources=(source,), eval_fraction=0, reading=ReadingConfig(on_bad_row="skip", prefetch=0))
    corpus = open_corpus(data, TOKENIZER)
    batches = take(make_train_iterator(corpus, TOKENIZER, sequence_length=32, rows=3), 2)
    assert all(tokens.tolist() == [7, 8, TOKENIZER.eos_id] for batch in batches for tokens, _, _ in segments(batch))
    assert corpus.bad_rows == 1 and f"holds token {bad}" in corpus.skipped[0]


def test_grain_is_imported_only_when_used():
    root = REPOSITORY
    script = (
        "import sys\n"
        "for name in ('grain', 'array_record', 'pyarrow'): sys.modules[name] = None\n"
        "import mmx_jax.data.pipeline as data\n"
        "from mmx_jax.config import DataConfig\n"
        "try: data.make_train_iterator(DataConfig(), None, sequence_length=8, rows=1)\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert "pip install mmx_jax[data]" in result.stdout
