"""The data pipeline: sources of documents to packed batches, deterministic, and resumable to the bit.

    source -> shuffle -> repeat -> a shard's share -> train split -> tokens -> pieces -> packed rows
    rows of all sources -> mixture -> rows of the shard
    rows of all shards in turn -> batches -> a thread that works ahead

Batches are the same whatever processes read them: the shards are numbered, and a process reads those that its rows of
a batch come from.

grain is imported when a pipeline is built, not before.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmx_jax.config import DataConfig
from mmx_jax.data import identity as data_identity
from mmx_jax.data.packing import PackingSpec, batches_of, pack, split_document
from mmx_jax.data.sources import (
    BadRowError,
    CheckedSource,
    DataError,
    Document,
    Source,
    import_extra,
    open_source,
    open_standard_library,
)
from mmx_jax.data.tokenizer import Tokenizer

# So many documents of every source are read when it is opened: what is smaller is known exactly.
_SCANNED_DOCUMENTS = 2000


def open_sources(data: DataConfig, tokenizer: Tokenizer | None = None) -> list[CheckedSource]:
    """The sources of a config, in order; the standard library's own code where it names none."""
    options = {"on_bad_row": data.reading.on_bad_row, "cache_dir": data.reading.cache_dir}
    eos_id = tokenizer.eos_id if tokenizer else None
    return [open_source(source, eos_id, **options) for source in data.sources] or [open_standard_library()]


def mixture(data: DataConfig, source_weights: Sequence[float] = ()) -> tuple[float, ...]:
    """Shares of the sources, summing to 1: those given, or the config's."""
    weights = tuple(source_weights) or tuple(source.weight for source in data.sources) or (1.0,)
    if len(weights) != max(1, len(data.sources)) or min(weights) <= 0:
        raise DataError(f"source_weights={weights} must hold a positive weight for each of {len(data.sources)} sources")
    return tuple(weight / math.fsum(weights) for weight in weights)


# -- held-out split ---------------------------------------------------------------------------------------------------


def content_hash(document: Document) -> float:
    """Uniform in [0, 1), from the content alone: copies of a document fall on one side of a split."""
    data = document.encode() if isinstance(document, str) else np.asarray(document, "<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


@dataclasses.dataclass(frozen=True)
class Split:
    """Held out are the documents whose hash is at most `threshold`; -1 holds out none."""

    threshold: float

    def is_held_out(self, document: Document) -> bool:
        return len(document) > 0 and content_hash(document) <= self.threshold

    def is_train(self, document: Document) -> bool:
        return len(document) > 0 and content_hash(document) > self.threshold


def make_split(sources: Sequence[Source], eval_fraction: float) -> Split:
    """The split of a corpus; reads the first documents of every source.

    A corpus so small that its hashes hold out nothing gives up the document with the smallest hash, out of a
    source that can spare one.

    Raises:
      DataError: a source has no document to train on, or there is but one document to train on and hold out.
    """
    hashes = [_scan(source) for source in sources]
    for source, found in zip(sources, hashes, strict=True):
        if not found:
            raise DataError(f"data source {source.name} is empty: none of its documents has any content")
    if eval_fraction == 0:
        return Split(-1.0)
    threshold = eval_fraction
    if all(len(source) <= _SCANNED_DOCUMENTS for source in sources) and min(map(min, hashes)) > threshold:
        spare = [min(found) for found in hashes if len(found) > 1]
        threshold = min(spare, default=1.0)
    for source, found in zip(sources, hashes, strict=True):
        if max(found) <= threshold:
            raise DataError(
                f"data source {source.name}: {len(found)} different documents, and all of them would be held out; add "
                f"documents, or set data.eval_fraction={eval_fraction} to less, 0 for no evaluation"
            )
    return Split(threshold)


def _scan(source: Source) -> set[float]:
    """Hashes of the first documents, and of more where none of those has any content."""
    hashes = set()
    for i in range(len(source)):
        if i >= _SCANNED_DOCUMENTS and hashes:
            break
        if len(document := source[i]):
            hashes.add(content_hash(document))
    return hashes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Opened data: what batches, evaluation and statistics read, opened and checked once for all of them."""

    config: DataConfig
    sources: list[CheckedSource]
    split: Split
    identity: list[dict]  # of each source, see `data_identity.source_identity`

    @property
    def notes(self) -> list[str]:
        """Notes on the sources for the user, a line each."""
        return [note for source in self.sources for note in source.notes]

    @property
    def skipped(self) -> list[str]:
        """Rows that this process has skipped so far, a line for each source."""
        return [line for source in self.sources for line in source.summary()]

    @property
    def bad_rows(self) -> int:
        """How many rows this process has skipped so far, each counted once."""
        return sum(len(source.bad_rows) for source in self.sources)


def open_corpus(data: DataConfig | Corpus, tokenizer: Tokenizer) -> Corpus:
    """Opens the sources of a config, and makes sure that each has something to train on.

    Raises:
      DataError: a source holds no document to train on, or none of which the tokenizer leaves a token.
    """
    if isinstance(data, Corpus):
        return data
    sources = open_sources(data, tokenizer)
    split = make_split(sources, data.eval_fraction)
    for i, source in enumerate(sources):
        next(_train_tokens(data, source, i, split, tokenizer))
    return Corpus(data, sources, split, [data_identity.source_identity(source) for source in sources])


# -- documents --------------------------------------------------------------------------------------------------------


class _Tokenise:
    """A document to int32 [n], eos at its end where the tokenizer has one; [0] where there is nothing to learn from.

    That is a document of which the tokenizer leaves nothing, or a bad one that is skipped.
    """

    def __init__(self, tokenizer: Tokenizer, source: CheckedSource):
        self._tokenizer = tokenizer
        self._source = source

    def __call__(self, document: Document) -> np.ndarray:
        tokenizer, eos_id = self._tokenizer, self._tokenizer.eos_id
        if isinstance(document, str):
            tokens = np.asarray(tokenizer.encode(document, parse_special=False), np.int32)
            if not len(tokens):
                self._source.without_tokens.add(content_hash(document))
        else:
            tokens = self._in_vocabulary(document)
        if eos_id is not None and len(tokens) and tokens[-1] != eos_id:
            tokens = np.append(tokens, np.int32(eos_id))
        return tokens

    def _in_vocabulary(self, document: np.ndarray) -> np.ndarray:
        low, high = int(document.min()), int(document.max())
        if low >= 0 and high < self._tokenizer.vocab_size:
            return document.astype(np.int32)
        error = BadRowError(
            f"a document of {self._source.name} holds token {low if low < 0 else high}; the vocabulary has "
            f"{self._tokenizer.vocab_size}: tokenise it with the tokenizer of this run"
        )
        self._source.skip(content_hash(document), error)
        return np.zeros(0, np.int32)


def _seed_of(*numbers: int) -> int:
    """A seed from several numbers; grain adds the epoch, so those of neighbours must lie far apart."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _shuffled(source: Source, index: int, seed: int) -> Iterator[Document]:
    """The documents of one epoch, in an order of its own."""
    grain = import_extra("grain")
    shuffled = grain.MapDataset.source(source).shuffle(_seed_of(seed, index))
    return (shuffled[i] for i in range(len(shuffled)))


def _shuffled_split(
    data: DataConfig, source: Source, index: int, split: Split, *, held_out: bool
) -> Iterator[Document]:
    keep = split.is_held_out if held_out else split.is_train
    return filter(keep, _shuffled(source, index, data.seed))


def _train_tokens(
    data: DataConfig, source: CheckedSource, index: int, split: Split, tokenizer: Tokenizer
) -> Iterator[np.ndarray]:
    """The training documents of an epoch that have tokens; DataError where not one has."""
    tokenise, found = _Tokenise(tokenizer, source), False
    for document in _shuffled_split(data, source, index, split, held_out=False):
        if len(tokens := tokenise(document)):
            found = True
            yield tokens
    if not found:
        reasons = "; ".join(source.summary())
        raise DataError(
            f"data source {source.name} has nothing to train on"
            + (f": {reasons}" if reasons else f": data.eval_fraction={data.eval_fraction} holds out all of it")
        )


def iterate_texts(data: DataConfig, max_characters: int = 4 * 1024 * 1024) -> Iterator[str]:
    """Texts of the train split to train a tokenizer on, of every source by its weight; the same in every call.

    Args:
      max_characters: in all, but for the length of the last document of each source.

    Raises:
      DataError: a source is tokenised already.
    """
    sources = open_sources(data)
    split = make_split(sources, data.eval_fraction)
    for i, (source, share) in enumerate(zip(sources, mixture(data), strict=True)):
        budget = share * max_characters
        for text in _shuffled_split(data, source, i, split, held_out=False):
            if not isinstance(text, str):
                raise DataError(f"{source.name} is tokenised already: set data.tokenizer to the tokenizer it needs")
            yield text
            budget -= len(text)
            if budget <= 0:
                break


@dataclasses.dataclass(frozen=True)
class CorpusStatistics:
    """Of the training documents that were read.

    `unigram_entropy` in nats per token, eos included, of the mixture: what a model that knows only how frequent
    tokens are would reach.
    """

    unigram_entropy: float
    tokens: int
    documents: int


def corpus_statistics(
    data: DataConfig | Corpus,
    tokenizer: Tokenizer,
    *,
    max_documents: int = 1000,
    source_weights: Sequence[float] = (),
) -> CorpusStatistics:
    """Counts tokens of at most `max_documents` training documents, an equal number from every source."""
    corpus = open_corpus(data, tokenizer)
    sources, weights = corpus.sources, mixture(corpus.config, source_weights)
    frequency, tokens, documents = np.zeros(tokenizer.vocab_size), 0, 0
    for i, (source, share) in enumerate(zip(sources, weights, strict=True)):
        chosen = _train_tokens(corpus.config, source, i, corpus.split, tokenizer)
        counts = np.zeros(tokenizer.vocab_size)
        for document in itertools.islice(chosen, max(1, max_documents // len(sources))):
            counts += np.bincount(document, minlength=tokenizer.vocab_size)
            documents += 1
        tokens += int(counts.sum())
        frequency += share * counts / counts.sum()
    present = frequency[frequency > 0]
    return CorpusStatistics(float(-(present * np.log(present)).sum()), tokens, documents)


# -- batches ----------------------------------------------------------------------------------------------------------


class TrainIterator:
    """Endless batches with a state. Built by `make_train_iterator`."""

    def __init__(self, iterator, identity: dict, names: Sequence[str]):
        self._iterator = iterator
        self._identity = identity
        self._names = names  # of the sources, for messages
        self.notes: list[str] = []  # what the user should know of a state that was set

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict:
        """The position after the last batch given out, of JSON types: that of each shard which is read here."""
        return {"identity": self._identity, "shards": self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        """Continues where `get_state` was called, here or, `merge_states`, in the processes that read the shards.

        Raises:
          DataError: the state was saved with other data; the message names what differs.
        """
        saved = state["identity"]
        if changed := data_identity.differences(saved, self._identity, self._names):
            raise DataError(
                "the saved data position does not fit this run: " + "; ".join(changed) + ". Put back what was there, "
                "or start a new run with a --workdir of its own on what is there now"
            )
        if not data_identity.is_complete(saved):
            self.notes = [
                "the data position was saved by a version that did not record what the data and the tokenizer hold: "
                "that they are the same is checked by the numbers of documents alone, and by content from now on"
            ]
        self._iterator.set_state(state["shards"])

    def close(self) -> None:
        """Stops the thread that works ahead."""
        self._iterator.close()


def merge_states(states: Sequence[dict]) -> dict:
    """The state of all shards, each once, from `TrainIterator.get_state` of all processes, by their index.

    Raises:
      DataError: processes read different data, or stand at different places of a shard that they share.
    """
    first, shards, readers = states[0]["identity"], {}, {}
    for process, part in enumerate(states):
        names = [str(i) for i in range(len(first["sources"]))]
        if changed := data_identity.differences(first, part["identity"], names):
            raise DataError(
                f"the data of process {process} are not those of process 0: {'; '.join(changed)}; give all of them the "
                "same files"
            )
        for number, state in part["shards"].items():
            reader = readers.setdefault(number, process)
            if shards.setdefault(number, state) != state:
                raise DataError(
                    f"processes {reader} and {process} both read shard {number} of the data and are not at the same "
                    "place in it: give them the same files, and start all from the same step"
                )
    return {"identity": first, "shards": shards}


def groups_of_rows(rows: int, shards: int, own_rows: Sequence[int]) -> dict[int, list[int]]:
    """The shards that rows of a batch come from, in groups, by their number.

    Each group of shards gives `rows` / gcd(`rows`, `shards`) neighbouring rows, from its shards in turn. Of 8 shards
    and 16 rows, each shard gives two; of 8 shards and 12 rows, each two shards give three.

    Args:
      rows: of the whole batch.
      own_rows: the numbers of those wanted.
    """
    groups = math.gcd(rows, shards)
    size = shards // groups
    wanted = sorted({int(row) * groups // rows for row in own_rows})
    return {group: list(range(group * size, (group + 1) * size)) for group in wanted}


class _Shard:
    """The rows of one shard: of all sources, by their weights.

    Row j is of the source in whose share of [0, 1) the number j / golden ratio + `phase` falls, modulo 1: such numbers
    fill it evenly, and those of shards whose phases lie evenly do so at every j.
    """

    _STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio

    def __init__(self, sources: list, weights: Sequence[float], phase: float):
        self.rows = 0
        self._sources = sources
        self._ends = np.cumsum(weights)[:-1]
        self._phase = int(phase * 2**64)

    def __next__(self):
        point = (self.rows * self._STEP + self._phase) % 2**64 / 2**64
        row = next(self._sources[np.searchsorted(self._ends, point, side="right")])
        self.rows += 1
        return row

    def get_state(self):
        return {"rows": self.rows, "sources": [source.get_state() for source in self._sources]}

    def set_state(self, state):
        self.rows = state["rows"]
        for source, saved in zip(self._sources, state["sources"], strict=True):
            source.set_state(saved)

    def close(self):
        for source in self._sources:
            source.close()


class _Batches:
    """Some rows of batches, of which every group of shards gives `size`: group 0 the first ones, and so on."""

    def __init__(self, groups: dict[int, dict[int, _Shard]], size: int, own_rows: Sequence[int]):
        self._groups = groups
        self._size = size
        self._own_rows = own_rows

    def __next__(self):
        rows = {}  # of a group all are taken, so that a shard's place does not depend on who reads it
        for number, group in self._groups.items():
            for row in range(number * self._size, (number + 1) * self._size):
                rows[row] = next(min(group.values(), key=lambda shard: shard.rows))  # in turn
        own = [rows[row] for row in self._own_rows]
        return {name: np.stack([row[name] for row in own]) for name in own[0]}

    def get_state(self):
        return {str(number): shard.get_state() for number, shard in self._shards()}

    def set_state(self, state):
        for number, shard in self._shards():
            shard.set_state(state[str(number)])

    def close(self):
        for _, shard in self._shards():
            shard.close()

    def _shards(self):
        return [item for group in self._groups.values() for item in group.items()]


def make_train_iterator(
    data: DataConfig | Corpus,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    rows: int,
    own_rows: Sequence[int] | None = None,
    source_weights: Sequence[float] = (),
    seed: int | None = None,
) -> TrainIterator:
    """Endless packed batches of the training documents.

    Every epoch of a source is shuffled anew; with `data.shuffle_buffer` only within windows of that many
    neighbouring documents, for files that are slow to read at random. Its documents are dealt out to `data.shards`
    shards, which pack them. Each row holds documents of one source; the weights of the mixture are shares of rows,
    hence of tokens. Documents longer than a row are cut, see `packing.split_document`.

    Args:
      data: sources, split, packing; or what `open_corpus` made of it.
      sequence_length: T.
      rows: of a whole batch.
      own_rows: the numbers of those to give out; None: all. They are the rows that an iterator of all gives there,
        and the position is the same, whichever others are read elsewhere, see `groups_of_rows`.
      source_weights: in place of the config's.
      seed: of the shuffles; None takes `data.seed`.

    Returns:
      Iterator over `{tokens, targets, segment_ids, positions}`, int32 [R, T] with R own rows. `targets` is the next
      token of the same document, -1 where there is none; `segment_ids` is 0 on padding.

    Raises:
      DataError, FileNotFoundError: data that cannot be used, here or when a document is reached.
      ImportError: grain is not installed.
    """
    grain = import_extra("grain")
    corpus = open_corpus(data, tokenizer)
    data = corpus.config
    own_rows = range(rows) if own_rows is None else own_rows
    seed = data.seed if seed is None else seed
    weights = mixture(data, source_weights)

    def open_shard(number: int):
        streams = [
            _packed_rows(corpus, tokenizer, i, number, sequence_length=sequence_length, seed=seed)
            for i in range(len(corpus.sources))
        ]
        return _Shard(streams, weights, phase=number / data.shards)

    numbers = groups_of_rows(rows, data.shards, own_rows)
    groups = {group: {number: open_shard(number) for number in members} for group, members in numbers.items()}
    iterator: Any = _Batches(groups, rows // math.gcd(rows, data.shards), own_rows)
    if data.reading.prefetch:
        iterator = grain.experimental.ThreadPrefetchDatasetIterator(iterator, data.reading.prefetch)
    own = dict(weights=list(weights), sequence_length=sequence_length, rows=rows, seed=seed)
    identity = _corpus_identity(corpus, tokenizer) | own
    return TrainIterator(iterator, identity, [source.name for source in corpus.sources])


def _corpus_identity(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that decide the rows of a corpus, apart from their length, number, weights and seed."""
    data = corpus.config
    return {
        "sources": corpus.identity,
        "tokenizer": data_identity.tokenizer_identity(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eval_fraction": data.eval_fraction,
        "shards": data.shards,
        "packing_bins": data.packing_bins,
        "packing_alignment": data.packing_alignment,
        "shuffle_buffer": data.shuffle_buffer,
    }


def _packed_rows(corpus: Corpus, tokenizer: Tokenizer, index: int, shard: int, *, sequence_length: int, seed: int):
    """Endless rows of the training documents that source `index` deals out to a shard."""
    grain = import_extra("grain")
    data, source = corpus.config, corpus.sources[index]
    documents = grain.MapDataset.source(source)
    document_seed = _seed_of(seed, index)
    if data.shuffle_buffer:
        documents = grain.experimental.WindowShuffleMapDataset(
            documents.repeat(), window_size=data.shuffle_buffer, seed=document_seed
        )
    else:
        documents = documents.shuffle(document_seed).repeat()
    documents = documents[shard :: data.shards].filter(corpus.split.is_train)
    pieces = _pieces(grain, documents.map(_Tokenise(tokenizer, source)), sequence_length)
    spec = _packing_spec(data, tokenizer, sequence_length)
    return iter(pack(grain, pieces, spec, seed=_seed_of(seed, index, shard), shuffle=True))


def _packing_spec(data: DataConfig, tokenizer: Tokenizer, sequence_length: int) -> PackingSpec:
    return PackingSpec(
        length=sequence_length,
        bins=data.packing_bins,
        alignment=data.packing_alignment,
        pad_id=tokenizer.pad_id or 0,
    )


def _pieces(grain, documents, length: int):
    """The pieces of a grain dataset of token arrays."""

    class Split(grain.experimental.FlatMapTransform):
        def flat_map(self, tokens):
            return split_document(tokens, length)

    # One thread, here or after batching: reading ahead by document would only compete with the thread for batches.
    documents = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return grain.experimental.FlatMapIterDataset(documents, Split())


def make_eval_batches(
    data: DataConfig | Corpus,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    rows: int,
    batches: int,
    own_rows: Sequence[int] | None = None,
    source_weights: Sequence[float] = (),
) -> list[dict[str, np.ndarray]]:
    """The held-out documents as batches, the same in every call.

    At most `batches * rows` rows, of the sources in proportion to their weights; fewer where the held-out documents are
    fewer. The last batch is filled with padding.

    Args:
      rows: of a whole batch.
      own_rows: the numbers of those to give out; None: all.

    Returns:
      List of `{tokens, targets, segment_ids, positions}`, int32 [R, T], as `make_train_iterator` gives them.

    Raises:
      DataError: `eval_fraction` is 0, or no document is held out.
    """
    eval_fraction = (data.config if isinstance(data, Corpus) else data).eval_fraction
    if eval_fraction == 0:
        raise DataError("data.eval_fraction is 0: nothing is held out to evaluate on")
    grain = import_extra("grain")
    corpus = open_corpus(data, tokenizer)
    data, split = corpus.config, corpus.split
    total = batches * rows
    chosen = []
    for i, (source, share) in enumerate(zip(corpus.sources, mixture(data, source_weights), strict=True)):
        wanted = math.ceil(share * total)
        documents = _held_out_tokens(data, source, i, split, _Tokenise(tokenizer, source), wanted * sequence_length)
        if documents:
            pieces = _pieces(grain, grain.MapDataset.source(documents), sequence_length)
            packed = pack(grain, pieces, _packing_spec(data, tokenizer, sequence_length), seed=0, shuffle=False)
            chosen += itertools.islice(packed, wanted)
    if not chosen:
        raise DataError(
            f"data.eval_fraction={eval_fraction} holds out none of the "
            f"{sum(map(len, corpus.sources)):,} documents to evaluate on: make it larger, or 0 for no evaluation"
        )
    own = list(range(rows) if own_rows is None else own_rows)
    whole = batches_of(chosen[:total], rows, tokenizer.pad_id or 0)
    return [{name: array[own] for name, array in batch.items()} for batch in whole]


def _held_out_tokens(data, source, index, split, tokenise, enough: int) -> list[np.ndarray]:
    """Held-out documents of a source, until they have `enough` tokens."""
    documents, tokens = [], 0
    for document in _shuffled_split(data, source, index, split, held_out=True):
        if len(found := tokenise(document)):
            documents.append(found)
            tokens += len(found)
        if tokens >= enough:
            break
    return documents
