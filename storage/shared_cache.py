"""What trials make once and then find: tokenized data, reference log-probs, the checkpoint they start from.

A trial runs alone on some machines' disks and beside eight others on some. So what it makes appears whole or not at
all, is made by one process at a time while those that want the same wait, and is found by what it depends on. If the
one that makes it dies, its lock goes with it, and the next in line makes it.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher

from storage.locks import locked

if TYPE_CHECKING:  # it takes seconds
    from transformers import PreTrainedTokenizerBase


def make_once(
    folder: Path, make: Callable[[Path], None], intact: Callable[[Path], bool], on_wait: Callable[[], None]
) -> bool:
    """Have `make` fill `folder`, unless one `intact` is there or another process is just making it; whether it had to.

    `on_wait` is called before waiting for that other process. Raises `UserError` where the folder cannot be made.
    """
    if intact(folder):
        return False
    scratch = folder.with_name(f"{folder.name}.partial")
    with locked(folder.with_name(f"{folder.name}.lock"), on_wait):
        if intact(folder):
            return False
        for left in (scratch, folder):  # by a process that was killed, or by a cleaner of old files
            shutil.rmtree(left, ignore_errors=True)
        try:
            make(scratch)
            scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return True


def fingerprint(*parts: Any) -> str:
    """A name for what depends on `parts` (plain values), and on the libraries that make it."""
    libraries = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "trl")
    return Hasher.hash([*parts, [version(library) for library in libraries]])


def hash_rows(dataset: Dataset) -> str:
    """SHA-256 of a data set's columns and rows, in their order.

    (The fingerprint that `datasets` keeps is of the steps that led to them, of which some change no row.)
    """
    table = dataset.with_format("arrow")[:].select(sorted(dataset.column_names)).replace_schema_metadata()
    written = pa.BufferOutputStream()
    with pa.ipc.new_stream(written, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return hashlib.sha256(written.getvalue()).hexdigest()


def hash_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of all that makes a tokenizer, its chat template too: of what it saves."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
