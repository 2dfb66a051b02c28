"""The tokenizer of a run: loaded or trained once, kept in the run's folder."""

import errno
import os
import pathlib
import shutil

from mmx_jax.config import Config, ConfigError
from mmx_jax.data import identity
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.storage import filesystem
from mmx_jax.training import initialize


def prepare_tokenizer(config: Config, workdir: pathlib.Path, init_from: str = "") -> tuple[Tokenizer, list[str]]:
    """The run's tokenizer, from workdir/tokenizer, and lines to tell the user about it.

    On the first start it is loaded or trained, and saved there. Raises ConfigError where `data.tokenizer` names another
    one than that of the run, or the model has too few embeddings.

    Args:
      init_from: the checkpoint that the run begins from now, whose tokenizer it is then; empty: none.
    """
    folder, notes = workdir / "tokenizer", []
    if init_from:
        loaded = initialize.tokenizer_of(config, init_from)
        if folder.exists():
            initialize.check_vocabulary(Tokenizer.load(folder), loaded, str(folder), "choose another --workdir")
    elif folder.exists():
        loaded = Tokenizer.load(folder)
        notes = identity.check_named_tokenizer(config.data.tokenizer, loaded, folder)
    elif config.data.tokenizer:
        loaded = Tokenizer.load(config.data.tokenizer)
    else:
        size = config.data.tokenizer_vocab_size or config.model.vocab_size
        loaded = Tokenizer.train(data_pipeline.iterate_texts(config.data), size)
    if loaded.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {loaded.vocab_size} entries of the "
            "tokenizer"
        )
    if not folder.exists():
        temporary = workdir / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        _save_tokenizer(loaded, temporary)
        os.replace(temporary, folder)
        loaded = Tokenizer.load(folder)  # as every later start and every other process reads it
    return loaded, notes


def _save_tokenizer(tokenizer, folder):
    try:
        tokenizer.save(folder)
    except Exception as error:  # the library raises bare Exceptions
        if not filesystem.is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
