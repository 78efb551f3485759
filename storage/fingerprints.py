"""Hash what a cached result depends on: rows, a tokenizer, options, and the libraries' releases."""

import hashlib
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase


def fingerprint(*parts: Any) -> str:
    """Return a hash of `parts` (plain values) and of the releases of the libraries that turn them into a result."""
    libraries = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "trl")
    return Hasher.hash([*parts, [version(library) for library in libraries]])


def hash_rows(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's columns and rows, in their order.

    (The fingerprint that `datasets` keeps is of the steps that led to the rows; some steps change no row.)
    """
    table = dataset.with_format("arrow")[:].select(sorted(dataset.column_names)).replace_schema_metadata()
    written = pa.BufferOutputStream()
    with pa.ipc.new_stream(written, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return hashlib.sha256(written.getvalue()).hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that a tokenizer saves, its chat template included."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
