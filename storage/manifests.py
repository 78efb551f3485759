"""Say whether a folder, such as a checkpoint, is whole: by the manifest saved in it, or else by reading its files."""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

from config.validation import validate
from errors import UserError, reading
from storage.files import flush_to_disk, remove, write_atomically

MANIFEST = "manifest.json"  # lies beside the files that it lists
# A file's path in that folder: its size in bytes, and its SHA-256, or "" if the size alone is checked.
Manifest = dict[str, tuple[int, str]]
CHUNK = 2**20  # bytes that are hashed at a time


def hash_files(folder: Path, largest: float = math.inf) -> Manifest:
    """Return the manifest of a folder. Files of more than `largest` bytes are not read: it has their sizes alone."""
    files = _files(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    hashed = _hash({name: path for name, path in files.items() if sizes[name] <= largest})
    return {name: hashed.get(name, (size, "")) for name, size in sizes.items()}


def write_manifest(folder: Path, files: Manifest) -> None:
    """Write the manifest of `folder`."""
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")


def check_files(
    folder: Path,
    needed: Iterable[tuple[str, ...]] = (),
    select: Callable[[str], bool] = lambda name: True,
) -> None:
    """Raise `UserError` unless a checkpoint's files are those that were saved; it names the first that is not.

    A checkpoint without a manifest is of an earlier release: its files must be there and readable.

    Args:
        needed: Patterns, of each of which a file must be there that matches one.
        select: Which files are checked, by their path in `folder`.
    """
    files = _files(folder)
    listed: Manifest = {}
    with_manifest = (folder / MANIFEST).is_file()
    if with_manifest:
        with reading(MANIFEST):
            listed = validate(Manifest, json.loads((folder / MANIFEST).read_bytes()), MANIFEST)
    for patterns in needed:
        if not any(fnmatch(name, pattern) for pattern in patterns for name in (listed if with_manifest else files)):
            raise UserError(f"{' or '.join(patterns)} is missing")
    if not with_manifest:
        for name in filter(select, files):
            with reading(name):
                _read(name, files)
        return
    for name in (listed := {name: known for name, known in listed.items() if select(name)}):
        if name not in files:
            raise UserError(f"{name} is missing")
        if (size := files[name].stat().st_size) != listed[name][0]:
            raise UserError(f"{name} has {size} of {listed[name][0]} bytes")
    for name, found in _hash({name: files[name] for name, (_, digest) in listed.items() if digest}).items():
        if found != listed[name]:
            raise UserError(f"{name} has changed since it was saved (SHA-256)")


def seal(file: Path) -> None:
    """Have a file's digest beside it, once the file is on the disk, so that `remove_unless_sealed` knows it again."""
    flush_to_disk(file)
    write_atomically(_seal_of(file), _digest(file))


def remove_unless_sealed(file: Path) -> None:
    """Remove a file that is not as it was when it was sealed."""
    sealed = _seal_of(file).read_text(errors="replace") if _seal_of(file).is_file() else ""
    if not file.is_file() or sealed != _digest(file):
        remove(file)


def _seal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _digest(file: Path) -> str:
    return _hash({file.name: file})[file.name][1]


def _files(folder: Path) -> dict[str, Path]:
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if name != MANIFEST}


def _hash(files: dict[str, Path]) -> Manifest:
    stop = threading.Event()  # else the process would end only once the threads have read their files

    def hash_file(item: tuple[str, Path]) -> tuple[int, str]:
        digest = hashlib.sha256()
        with reading(item[0]), item[1].open("rb") as file:
            while not stop.is_set() and (chunk := file.read(CHUNK)):
                digest.update(chunk)
            return item[1].stat().st_size, digest.hexdigest()

    with ThreadPoolExecutor(max_workers=4) as pool:
        try:
            return dict(zip(files, pool.map(hash_file, files.items()), strict=True))
        finally:
            stop.set()


def _read(name: str, files: dict[str, Path]) -> None:
    """Raise some exception if a file is not what its name says: weights, JSON, or a zip file as torch saves it."""
    path = files[name]
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np"):  # compares the header with the file's size
            pass
    elif path.suffix == ".json":
        content = json.loads(path.read_bytes())
        if name.endswith(".index.json"):
            for part in sorted({str(Path(name).with_name(part)) for part in content["weight_map"].values()}):
                if part not in files:
                    raise UserError(f"{part} is missing")
    elif path.suffix in (".pt", ".pth", ".bin"):
        with ZipFile(path) as archive:
            if torn := archive.testzip():
                raise UserError(f"{name}: {torn} in it is torn")
