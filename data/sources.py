"""Load rows from the hub, local files and folders, or a stream; convert those that are used, and split them.

A mistake in the data is a `UserError` that names the file and the line, or the data set and the row.
"""

import glob
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import determined as det
import numpy as np
from datasets import Dataset, get_dataset_config_names, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from config.hyperparameters import DataSource
from data.formats import MissingColumnError
from errors import TemporaryError, UserError, nearest, reading, reason
from signals import CRASHES, run_in_child
from storage.files import check_output, refuse_special_files
from storage.fingerprints import fingerprint
from storage.hub import check_hub_id, looks_like_path, no_such, quiet_lookup

CHILD_SECONDS, CHILD_BYTES = 60, 10**8  # for a child to read a source, and how much; it shows no progress
MOST_OTHER_FILES = 10_000  # in a folder of data; of its own formats it may have any number
MOST_CSV_COLUMNS = 1000  # whose cells are read as text
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class LoadedSource:
    """The rows of one split of a source."""

    source: DataSource
    rows: Dataset
    split: str
    streamed: bool

    def locate(self, index: int | None = None) -> str:
        """Say for an error message where the row at `index` is; without an index, which data set it is.

        A row is located by its file and line if each line of the file holds a row, else by its number, from 1.
        """
        name = f"data set {self.source}"
        if index is None:
            return name
        if self.streamed:
            return f"{name} row {index + 1} of those streamed"
        for file, number, _ in itertools.islice(_local_lines(self.source, self.split), index, None):
            return f"{file} line {number}"
        return f"{name} row {index + 1}"

    def sample_size(self) -> int:
        """Return how many rows to take. Raises `UserError` if the source has fewer than `number_of_samples`."""
        found = len(self.rows)
        size = self.source.number_of_samples or max(1, round(found * (self.source.ratio or 1.0)))
        if size > found:
            raise UserError(f"{self.locate()}: number_of_samples is {size}, but it has only {found} rows")
        return size


def load_source(source: DataSource, stream_seed: int | None = None) -> LoadedSource:
    """Load the rows of a source. Raises `UserError` if it is missing, malformed or empty.

    With a `stream_seed`, `source.number_of_samples` rows, which must be set, are drawn and kept in the cache of
    `datasets`. Only as much of the source is read as that takes.
    """
    with _explain_load_errors(source):
        arguments = _load_arguments(source)
        if _reader_may_crash(Path(source.name)):
            status = run_in_child(lambda: _load(source, arguments, stream_seed), CHILD_SECONDS)
            if status in CRASHES:
                ended = f"its reader crashes ({signal.Signals(-status).name}): is it nested too deeply, or only null?"
                raise UserError(f"data set {source}: {ended}")
        rows, split = _load(source, arguments, stream_seed)
    if len(rows) == 0:
        raise UserError(f"data set {source}: it has no rows")
    return LoadedSource(source, rows, split, stream_seed is not None)


def _reader_may_crash(path: Path) -> bool:
    """Return whether a child should read `path` first, as that may end Python. What it reads stays in the cache.

    pandas' and pyarrow's readers do so for JSON that is nested too deeply (pandas 3.1, pyarrow 26). This can go once
    they raise. A trial of a cluster or of local_experiment.py, and a rank, may have threads and CUDA and do not fork.
    """
    files = [path] if path.suffix in (".json", ".jsonl") else list(path.rglob("*.json*"))
    is_trial = "RANK" in os.environ or det.get_cluster_info() or multiprocessing.parent_process()
    return bool(files) and not is_trial and sum(file.stat().st_size for file in files) < CHILD_BYTES


def _load(source: DataSource, arguments: dict[str, Any], stream_seed: int | None) -> tuple[Dataset, str]:
    """Return the rows of a source, and the split that they are."""
    split, streamed = source.split, stream_seed is not None
    rows: Any = load_dataset(**arguments, split=split, streaming=streamed)
    if split is None:
        if "train" not in rows and len(rows) > 1:
            raise UserError(f"data set {source}: no train split among {', '.join(rows)}; choose one with split")
        split = "train" if "train" in rows else next(iter(rows))
        rows = rows[split]
    if streamed:
        # Shuffling draws from a buffer of 1000 rows. The buffer is filled from ten files at a time, which are taken
        # in random order and read from their beginning. A uniform sample would need to read all files.
        drawn = rows.shuffle(seed=stream_seed).take(source.number_of_samples)
        # Its own fingerprint would be the lambda's. The builder's hash is the hub's commit, or the files' state.
        builder = load_dataset_builder(**arguments)
        key = (arguments, builder.hash, builder.config_id, split, source.number_of_samples, stream_seed)
        rows = Dataset.from_generator(lambda: iter(drawn), features=drawn.features, fingerprint=fingerprint(*key))
    return rows, split


def convert_rows(
    loaded: LoadedSource,
    indices: np.ndarray,
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    known_columns: Collection[str],
) -> Dataset:
    """Return the rows at `indices`, in the source's order, converted by a function of `data/formats.py`.

    `known_columns` are those that `convert` may read. Each converted row also has the name of its `source` and the
    number of its `row` there, from 1. Raises `UserError` with the place of the first row that is malformed.
    """
    # `Dataset.map` would be slower for a part of the rows, and draw a progress bar. A row of a `lazy` data set decodes
    # a column when it is first read.
    rows = _rename_columns(loaded, known_columns).with_format("python", lazy=True)
    converted = []
    for index in np.sort(indices).tolist():
        try:
            row, values = _Row(), rows[index]
            for column in values:
                with reading(f"column {column!r}"):
                    row[column] = values[column] if column in known_columns else None
            converted.append({**convert(row), "source": str(loaded.source), "row": index + 1})
            for column in sorted(loaded.source.columns.keys() - row.used):
                raise UserError(f"columns.{column} is not read, because the row also has the columns of another format")
        except UserError as error:
            place = loaded.locate(None if isinstance(error, MissingColumnError) else index)
            raise UserError(f"{place}: {error}") from error
    return Dataset.from_list(converted)


class _Row(dict[str, Any]):
    """A row that remembers which of its columns were used."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.used.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        """Return the value of a column, or `default`."""
        self.used.add(column)
        return super().get(column, default)


def refuse_overlaps(sources: list[DataSource], evaluation: Collection[DataSource] = ()) -> list[DataSource]:
    """Return all evaluation data: `evaluation`, and what the sources name, each once.

    Raises `UserError` if rows would count twice: if a source is named twice, or is evaluation data as well. Evaluation
    data may be another slice of a split: `split: train[:90%]`, `eval_split: train[90%:]`.
    """
    named = [*(source.evaluation for source in sources if source.evaluation), *evaluation]
    evaluated = list({str(source): source for source in named}.values())
    read = [(source, _what_is_read(source)) for source in (*sources, *evaluated) if len(sources) + len(evaluated) > 1]
    for (one, of_one), (other, of_other) in itertools.combinations(read, 2):
        slices = one.split != other.split and all("[" in str(source.split) for source in (one, other))
        if of_one & of_other and not (other in evaluated and slices):
            again = "" if str(one) == str(other) else f": data set {other} has rows of it, too"
            held_out = other in evaluated and one not in evaluated
            twice = "trained on and evaluation data as well" if held_out else "named more than once"
            raise UserError(f"data set {one} is {twice}{again}")
    return evaluated


def _what_is_read(source: DataSource) -> set[Any]:
    """Return the local files that hold a source's rows, and what names them."""
    split = _split_name(source)
    with _explain_load_errors(source):
        names = {(os.path.realpath(source.name), source.subset or "default", split)}
        return names | set(map(os.path.realpath, _data_files(source, split) if Path(source.name).exists() else ()))


def _data_files(source: DataSource, split: str) -> list[str]:
    return (load_dataset_builder(**_load_arguments(source)).config.data_files or {}).get(split, [])


def _load_arguments(source: DataSource) -> dict[str, Any]:
    path, name = Path(source.name), f"data set {source.name}"
    _refuse_other_folders(path, name)
    refuse_special_files(path, name, "**/*")
    if not path.exists():
        if path.suffix in FILE_FORMATS or looks_like_path(source.name):
            raise UserError(f"{name}: {no_such('file or folder')}")
        check_hub_id(source.name, name)
    if path.exists() and ("::" in source.name or (path.is_dir() and glob.escape(source.name) != source.name)):
        raise UserError(f"{name}: rename it, as datasets reads :: as a link, and *, ? or [ of a folder as a pattern")
    arguments: dict[str, Any] = {"path": source.name, "name": source.subset}
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise UserError(f"{name}: a file must end in one of {', '.join(FILE_FORMATS)}")
        if source.subset is not None:
            advice = "leave subset out to use all of its rows (for SFT, set dataset_subsets to [{ratio: 1.0}])"
            raise UserError(f"{name}: a single file has no subset {source.subset!r}; {advice}")
        arguments = {"path": FILE_FORMATS[path.suffix], "data_files": {"train": glob.escape(source.name)}}
    elif path.is_dir() and not (path / "README.md").exists():  # a README may say which files belong to a subset
        formats = {FILE_FORMATS[file.suffix]: file.name for file in path.iterdir() if file.suffix in FILE_FORMATS}
        if len(formats) > 1:
            several = f"it holds files of several formats ({', '.join(formats.values())})"
            raise UserError(f"{name}: {several}, but only one format would be read; make a folder for each")
    config = load_dataset_builder(**arguments).config if path.exists() else None
    if path.is_dir() and config:
        # datasets 5.2 finds a folder whose README lists its files in its cache by the README, whatever became of the
        # files. This keeps each state of them apart, by their names and times. It can go once datasets does.
        state = Hasher.hash(config.data_files)
        arguments["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE, f"{path.resolve().name}-{state}"))
    if hasattr(config, "converters"):
        # pandas would read the text of a CSV's cells as numbers, and None or NA as missing.
        arguments |= {"converters": dict.fromkeys(range(MOST_CSV_COLUMNS), _read_cell), "keep_default_na": False}
    return arguments


def _refuse_other_folders(path: Path, name: str) -> None:
    """Raise `UserError` for a folder such as / or a home, which would be searched for minutes."""
    others = 0
    for _, folders, files in os.walk(path):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]  # as datasets does
        others += sum(FILE_FORMATS.keys().isdisjoint(Path(file).suffixes) for file in files)
        if others > MOST_OTHER_FILES:
            raise UserError(f"{name}: it has more than {MOST_OTHER_FILES:,} files of other formats; is it a data set?")


def _read_cell(text: str) -> str | None:
    return text or None


@contextmanager
def _explain_load_errors(source: DataSource) -> Iterator[None]:
    """Turn what `datasets` raises for a source that it cannot load into a `UserError` of one line."""
    check_output(Path(datasets.config.HF_DATASETS_CACHE), "HF_HOME, or HF_DATASETS_CACHE:", is_folder=True)
    try:
        with quiet_lookup():
            yield
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of its HTTP library
        name, text, is_local = f"data set {source}", str(error), Path(source.name).exists()
        cause: BaseException = error
        # datasets 5.2 lets StopIteration out of a builder that finds nothing but empty files.
        if isinstance(error, StopIteration) or "corresponds to no data" in text:
            raise UserError(f"{name}: it has no rows") from None
        if isinstance(error, DatasetGenerationError):
            cause = error.__cause__ or error
            problem = _find_malformed_line(source) or f"{name}: {reason(cause)}"
        elif "BuilderConfig" in text or "Config name is missing" in text:
            known = get_dataset_config_names(source.name)
            unknown = f"unknown subset {source.subset!r}{nearest(source.subset or '', known)}"
            fault = unknown if source.subset else "dataset_subsets must name a subset"
            problem = f"{name}: {fault}: it has {', '.join(known)}"
        elif is_local or "split" in text:
            problem = f"{name}: {reason(error)}"
        else:
            problem = f"{name}: {no_such('file or folder')}, and the hub does not provide it ({reason(error)})"
        # The hub and the network raise errors of many kinds, which may pass. A ValueError is the user's mistake.
        raise (UserError if is_local or isinstance(cause, ValueError) else TemporaryError)(problem) from error


def _split_name(source: DataSource) -> str:
    """Return the split that the source names or most likely means, without a slice."""
    return (source.split or "train").split("[")[0]


def _find_malformed_line(source: DataSource) -> str | None:
    for file, number, line in _local_lines(source, _split_name(source), skip=True):
        try:
            if not isinstance(json.loads(line.rstrip()), dict):
                return f"{file} line {number}: not a JSON object"
        except json.JSONDecodeError as error:
            return f"{file} line {number}: not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return None


def _local_lines(source: DataSource, split: str, skip: bool = False) -> Iterator[tuple[str, int, str]]:
    """Yield the file, number and text of each line that holds a row, up to the first file whose lines are not rows.

    `skip` passes over such a file instead: what comes after it is then not in the order of the rows' numbers.
    """
    for file in map(Path, _data_files(source, split)):
        if file.is_file() and file.suffix in (".jsonl", ".json"):
            with file.open(encoding="utf-8", errors="replace") as lines:
                rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
                first = next(rows, (0, ""))
                if not first[1].lstrip().startswith("["):  # an array of rows
                    yield from ((str(file), number, line) for number, line in itertools.chain([first], rows) if number)
                    continue
        if not skip:
            return


def _rename_columns(loaded: LoadedSource, known_columns: Collection[str]) -> Dataset:
    """Give columns the names that `source.columns` maps to them. Columns that had those names are removed."""
    rows, names = loaded.rows, loaded.source.columns
    for column, theirs in names.items():
        if column not in known_columns:
            raise UserError(f"columns.{column}: no column of that name is read{nearest(column, known_columns)}")
        if theirs not in rows.column_names:
            close, present = nearest(theirs, rows.column_names), ", ".join(rows.column_names)
            raise UserError(f"columns.{column}: {loaded.locate()} has no column {theirs!r}{close}; it has {present}")
    if len(set(names.values())) < len(names):
        raise UserError(f"columns: {', '.join(names)} must be different columns of {loaded.locate()}")
    replaced = [column for column in names if column in rows.column_names and column not in names.values()]
    return rows.remove_columns(replaced).rename_columns({theirs: column for column, theirs in names.items()})
