"""Choose where this user of an agent keeps models and data. `startup-hook.sh` runs it in every container of a cluster.

    HF_HOME=$(python3 -m storage.hf_home)

The YAMLs name one HF_HOME on the agent's disk, and the containers of several users may see it. It belongs to whoever
came first. Everybody else, root as well, gets a folder of their own beside it, which links to what they can read there.
So nobody writes into another user's folder, and no folder has to be writable for all.

It has only Python's standard library, as it runs before huggingface_hub and datasets read HF_HOME.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

# What is read without running code that is in it. A pickle (.bin, .pt) or a .py file of another user is not linked: the
# libraries then download their own.
READ_SAFELY = {".safetensors", ".json", ".model", ".txt", ".jinja", ".md", ".jsonl", ".csv", ".parquet", ".arrow"}
# The hub's downloads, and the data sets that `datasets` made of them. Checkpoints of another user are not shared: their
# UUIDs do not say what is in them.
SHARED = ("hub", "datasets")
WRITTEN = (*SHARED, "determined", "modules", "xet")  # what the libraries and this project write into HF_HOME


def choose_home(home: Path, uid: int) -> tuple[Path, str]:
    """Return `home`, or a folder of this user's own instead, and why `home` is none; "" if it is.

    A user's later starts find the same folder again, unless nothing outside of the container can be written.
    """
    beside, within = Path(f"{home}-{uid}"), home / f"user-{uid}"
    in_container = Path(tempfile.gettempdir(), f"huggingface-{uid}")
    why = why_not_own(home)
    others = (beside, within, in_container) if why else ()
    return next((folder for folder in others if not why_not_own(folder)), home), why


def why_not_own(folder: Path) -> str:
    """Return why `folder` is not this user's to write to, in words; "" if it is. It is made if it is missing."""
    try:
        folder.mkdir(0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            uid = os.fstat(probe.fileno()).st_uid  # a network's disk may know this process's by another number
        if folder.stat().st_uid != uid:
            return "it belongs to another user"
        # Root or another user may have left something in it: locks, models, the folders themselves.
        written = [path for name in WRITTEN for path in (folder / name, *(folder / name).glob("*"))]
        if any(_owner(path) not in (None, uid) and not os.access(path, os.W_OK) for path in written):
            return "files of another user are in it"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _owner(path: Path) -> int | None:
    """Return the uid of a file, folder or link; None if it is not there, perhaps no longer."""
    with suppress(FileNotFoundError):
        return path.lstat().st_uid
    return None


def link_readable(shared: Path, own: Path) -> int:
    """Link in the HF_HOME `own` to the models and data in `shared` that can be read; returns how many files.

    The folders are real ones, so the libraries may add to them, and they never write into a file that is linked.
    """
    linked = 0
    for file in _readable(shared):
        place = file.relative_to(shared)
        link = own / place
        with suppress(OSError):  # another container of this user is at it as well
            link.parent.mkdir(0o755, parents=True, exist_ok=True)
            if not link.exists():
                partial = link.with_name(f"{link.name}.{uuid4().hex}")
                if _is_ref(place):  # a small file, which the hub's client writes over
                    shutil.copyfile(file, partial)
                else:
                    partial.symlink_to(file.resolve())
                partial.replace(link)  # it may be a link to what is gone
            linked += link.is_symlink()
    return linked


def _readable(shared: Path) -> Iterator[Path]:
    for name in SHARED:
        for parent, folders, files in os.walk(shared / name):
            # Not locks, nor what is being written, nor files whose names do not say what they are.
            skipped = (".", "blobs", "downloads")
            folders[:] = [f for f in folders if not f.startswith(skipped) and not f.endswith(".incomplete")]
            for path in (Path(parent, file) for file in files):
                safe = path.suffix in READ_SAFELY or _is_ref(path.relative_to(shared))
                if safe and path.is_file() and os.access(path, os.R_OK):
                    yield path


def _is_ref(place: Path) -> bool:
    """Return whether it is `hub/models--.../refs/main` or the like: the name of a branch's commit."""
    return place.parts[2:3] == ("refs",)


def main() -> None:
    """Print the HF_HOME to use; and on stderr, if it is another than the environment's, which and why."""
    home = Path(os.environ["HF_HOME"]).expanduser().absolute()
    own, why = choose_home(home, os.getuid())
    if own != home:
        linked = link_readable(home, own)
        count = f"{linked or 'no'} file{'s' * (linked != 1)} of models and data that can be read there"
        print(f"startup-hook.sh: HF_HOME {home}: {why}: using {own}, with {count}", file=sys.stderr)
    print(own)


if __name__ == "__main__":
    main()
