"""Write a model as one plain folder: weights, tokenizer, chat template, generation config, what Ollama needs."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chat_format import adds_bos, generation_stops
from errors import UserError, os_errors_of
from storage.files import check_output, flush_to_disk, write_atomically
from storage.hub import quiet_lookup

SENTENCE_PIECE = "tokenizer.model"


def check_folder(folder: Path, key: str) -> None:
    """Raise `UserError` about `key` unless `folder` is new or empty, and a folder can be made in its place."""
    with os_errors_of(f"{key} {folder}"):
        if folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
            what = "a link" if folder.is_symlink() else "there, and not empty"
            raise UserError(f"{key} {folder}: it is {what}; choose another, or remove it")
    check_output(folder, key, is_folder=True)
    check_output(folder.absolute().parent, key, is_folder=True)


@contextmanager
def finished_at_end(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` at the end; after an error nothing is left.

    Till then it is in one of its own beside `folder`, which no other export uses; a kill leaves that one. Of two
    exports to one `folder` the first to end gets it, and the other raises `UserError`.
    """
    folder = folder.absolute()
    with os_errors_of(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{folder.name[:40]}.partial-"  # a whole name may leave no room for more
        scratch = TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True)
    with scratch:
        partial = Path(scratch.name, "export")  # the scratch folder is for the user alone, this one is not
        with os_errors_of(folder):
            partial.mkdir()
        yield partial
        with os_errors_of(folder):
            for file in filter(Path.is_file, partial.rglob("*")):
                file.chmod(partial.stat().st_mode & 0o666)  # save_pretrained's weights are for the user alone
            flush_to_disk(partial)
            partial.rename(folder)  # over an empty one
            flush_to_disk(folder.parent, within=False)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in `dtype` with all that a server reads: tokenizer, chat template, generation config.

    The generation config stops at EOS, at `<|im_end|>` if that is one token, and at the model's own stops.
    """
    config: Any = model.config
    stops = generation_stops(model, tokenizer)["eos_token_id"]
    model.generation_config.eos_token_id = stops
    config.get_text_config().eos_token_id = stops  # for servers that do not read the generation config
    config.use_cache = config.get_text_config().use_cache = True  # training has set it to False
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_files_for_ollama(folder: Path, tokenizer: PreTrainedTokenizerBase, source: str, base: str | None) -> bool:
    """Add to a folder what Ollama's and llama.cpp's converters read of a tokenizer; return whether that is enough.

    They read whether BOS is added from tokenizer_config.json, where transformers (5.23) does not write it: without it
    each guesses. And they take a tokenizer of SentencePiece's kind, such as Gemma's, from `SENTENCE_PIECE` and the
    tokens that were added to it from added_tokens.json; tokenizer.json they would read as one of GPT-2's kind.
    (Ollama's convert/tokenizer.go, August 2026.) transformers still reads tokenizer.json. This can go once they do.
    """
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.bos_token is not None:
        config["add_bos_token"] = adds_bos(tokenizer)
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
    if not _falls_back_to_bytes(tokenizer):
        return True
    if not (folder / SENTENCE_PIECE).exists():
        found = next(filter(None, map(_find_sentence_piece, (source, base))), None)
        if found is None:
            return False
        shutil.copyfile(found, folder / SENTENCE_PIECE)
    added = {token: id for token, id in tokenizer.get_added_vocab().items() if id >= tokenizer.vocab_size}
    if added:
        write_atomically(folder / "added_tokens.json", json.dumps(added, indent=2, ensure_ascii=False))
    return True


def _falls_back_to_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(getattr(getattr(backend, "model", None), "byte_fallback", False))


def _find_sentence_piece(source: str | None) -> str | None:
    """Return where `SENTENCE_PIECE` of a model is, in its folder or the hub's cache; None if it is out of reach."""
    from transformers.utils import cached_file

    if source is None or ((path := Path(source)).is_dir() and not (path / SENTENCE_PIECE).is_file()):
        return None
    with suppress(Exception), quiet_lookup():  # what the hub's client raises; this is only for Ollama
        return cached_file(source, SENTENCE_PIECE)
    return None
