"""Choose where this user of an agent keeps models and data. `startup-hook.sh` runs it in every container of a cluster.

    HF_HOME=$(python3 -m storage.hf_home)

The YAMLs name one HF_HOME on the agent's disk, and the containers of several users may see it. It belongs to whoever
came first. Everybody else, root as well, gets a folder of their own beside it, with what they can read there: links to
weights and tables, copies of text. So nobody writes into another user's folder, and none has to be writable for all.

What another user has left there may be meant to harm. Their code is never run, and no file is copied that is not really
in that folder (a link could lead to this user's secrets). That a model's weights are the right ones is taken on trust.
A folder around HF_HOME that others may write to needs the sticky bit, as /tmp has it; this is not checked here.

It has only Python's standard library, as it runs before huggingface_hub and datasets read HF_HOME.
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

# What is read without running code that is in it. A pickle (.bin, .pt) or a .py file of another user is not taken: the
# libraries then download their own. Linked are only formats that nothing else passes for, as their owner can put a link
# to another file in their place later. The others are copied: a checkpoint repeats a chat template word for word.
LINKED = {".safetensors", ".parquet", ".arrow"}
COPIED = {".json", ".model", ".txt", ".jinja", ".md", ".jsonl", ".csv"}
LARGEST_COPY = 2**26  # bytes
# With trust_remote_code, transformers would run code of any repository that one of these names in a .json file.
NAME_CODE = ('"auto_map"', '"base_model_name_or_path"')
# The hub's downloads, and the data sets that `datasets` made of them. Checkpoints of another user are not shared: their
# UUIDs do not say what is in them.
SHARED = ("hub", "datasets")
WRITTEN = (*SHARED, "determined", "modules", "xet")  # what the libraries and this project write into HF_HOME


def choose_home(home: Path, uid: int) -> tuple[Path, str]:
    """Return `home`, or a folder of this user's own instead, and why `home` is none; "" if it is.

    A user's later starts find the same folder again, unless nothing outside of the container can be written.
    """
    why = why_not_own(home)
    others = [Path(f"{home}-{uid}"), home / f"user-{uid}", Path(tempfile.gettempdir(), f"huggingface-{uid}")]
    if os.path.ismount(home):
        del others[0]  # beside it is the container's own disk
    return next((folder for folder in others if why and not why_not_own(folder)), home), why


def why_not_own(folder: Path) -> str:
    """Return why `folder` is not this user's to write to, in words; "" if it is. It is made if it is missing."""
    try:
        folder.mkdir(0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            uid = os.fstat(probe.fileno()).st_uid  # a network's disk may know this process's by another number
        if folder.stat().st_uid != uid or _owner(folder) not in (uid, 0):  # a link, which may lead elsewhere tomorrow
            return "it belongs to another user"
        if folder.stat().st_mode & 0o022:
            return "others may write to it (chmod go-w)"
        # Root or another user may have left something in it: locks, models, the folders themselves.
        written = [path for name in WRITTEN for path in (folder / name, *(folder / name).glob("*"))]
        if any(_owner(path) not in (None, uid) for path in written):
            return "files of another user are in it"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _owner(path: Path) -> int | None:
    """Return the uid of a file, folder or link; None if it is not there, perhaps no longer."""
    with suppress(FileNotFoundError):
        return path.lstat().st_uid
    return None


def take_readable(shared: Path, own: Path) -> int:
    """Fill the HF_HOME `own` with the models and data in `shared` that can be read; returns how many files there are.

    The folders are real ones, so the libraries may add to them, and they never write into a file that is linked.
    """
    taken = 0
    shared = Path(os.path.realpath(shared))
    for file in _readable(shared):
        place = file.relative_to(shared)
        link = own / place
        with suppress(OSError, ValueError, RecursionError):  # another container of this user is at it too; or no JSON
            if not link.exists():
                text = None if file.suffix in LINKED and not _is_ref(place) else _harmless(file, shared)
                link.parent.mkdir(0o755, parents=True, exist_ok=True)
                partial = link.with_name(f"{link.name}.{uuid4().hex}")
                if text is None:
                    partial.symlink_to(os.path.realpath(file))
                else:
                    partial.touch(0o600)
                    partial.write_bytes(text)
                partial.replace(link)  # it may be a link to what is gone
            taken += not _is_ref(place)
    return taken


def _readable(shared: Path) -> Iterator[Path]:
    for name in SHARED:
        for parent, folders, files in os.walk(shared / name):
            # Not locks, nor what is being written, nor files whose names do not say what they are.
            skipped = (".", "blobs", "downloads")
            folders[:] = [f for f in folders if not f.startswith(skipped) and not f.endswith(".incomplete")]
            for path in (Path(parent, file) for file in files):
                safe = path.suffix in LINKED | COPIED or _is_ref(path.relative_to(shared))
                inside = shared in Path(os.path.realpath(path)).parents
                if safe and inside and os.access(path, os.R_OK):
                    yield path


def _harmless(path: Path, shared: Path) -> bytes:
    """Return what is in a file of `shared`.

    Raises `OSError` if it is elsewhere, too large, or names code to run; `ValueError` or `RecursionError` if a .json
    file cannot be parsed, so that it is not known.
    """
    # A link may have taken the place of the file or its folder just now, so ask what was opened. A pipe must not block.
    with os.fdopen(os.open(os.path.realpath(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
        found = Path(f"/proc/self/fd/{opened.fileno()}")
        inside = found.is_file() and shared in found.readlink().parents
        text = opened.read(LARGEST_COPY + 1) if inside else b""
    harmless = inside and len(text) <= LARGEST_COPY
    if _is_ref(path.relative_to(shared)):
        harmless &= re.fullmatch(rb"[0-9a-f]{40}", text) is not None
    elif path.suffix == ".json":
        told = json.dumps(json.loads(text.decode()))  # a key may be written with escapes: \u005f is _
        harmless &= not any(name in told for name in NAME_CODE)
    if not harmless:
        raise OSError
    return text


def _is_ref(place: Path) -> bool:
    """Return whether it is `hub/models--.../refs/main` or the like: the name of a branch's commit."""
    return place.parts[2:3] == ("refs",)


def main() -> None:
    """Print the HF_HOME to use; and on stderr, if it is another than the environment's, which and why."""
    home = Path(os.environ["HF_HOME"]).expanduser().absolute()
    own, why = choose_home(home, os.getuid())
    if own != home:
        taken = take_readable(home, own)
        count = f"{taken or 'no'} file{'s' * (taken != 1)} of models and data that can be read there"
        print(f"startup-hook.sh: HF_HOME {home}: {why}: using {own}, with {count}", file=sys.stderr)
    print(own)


if __name__ == "__main__":
    main()
