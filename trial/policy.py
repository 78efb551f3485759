"""Load the model that a trial trains: all of its weights or, with `lora`, an adapter on it."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from chat_format import set_chat_format
from config.hyperparameters import Hyperparameters
from errors import UserError
from storage.adapter_chains import name_base
from storage.hub import commit_of
from trial.models import load_model_and_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adapters.stack import AdapterStack


def load_policy(
    hparams: Hyperparameters,
    source: str,
    *,
    added_tokens: list[str] | None = None,
    checkpoint: str | None = None,
    weights: bool = True,
) -> "tuple[PreTrainedModel | AdapterStack, PreTrainedTokenizerBase]":
    """Return the model to train and its tokenizer, both with the chat format and with `added_tokens`.

    `source` is a folder or a hub id, and `checkpoint` the UUID of the checkpoint in that folder, if it is one. Without
    `weights`, parameters have shapes but no values. Raises `UserError` if it cannot be loaded or cannot have the
    adapter.
    """
    lora = hparams.lora_config
    kwargs = hparams.model_init_kwargs
    key = "model_ckpt" if hparams.checkpoint else "model_name"
    model, tokenizer = load_model_and_tokenizer(source, key, weights=weights, merge=lora is None, **kwargs)
    old_size = len(tokenizer)
    set_chat_format(model, tokenizer, added_tokens)
    if lora is None:
        return model, tokenizer
    from adapters.stack import add_adapter

    lora = copy.deepcopy(lora)
    if new := list(range(old_size, len(tokenizer))):
        ends = {model.get_input_embeddings().weight: None, model.get_output_embeddings().weight: None}
        names = [name for name, module in model.named_modules() if getattr(module, "weight", None) in ends]
        tied = len(ends) == 1  # then peft has the output layer follow the embeddings
        lora.trainable_token_indices = {name.rpartition(".")[2]: new for name in (names[:1] if tied else names)}
    folder = Path(source, kwargs.get("subfolder") or "")
    if kwargs.get("subfolder") and not folder.is_dir():
        raise UserError("model_init_kwargs.subfolder: an adapter cannot stand on a part of a hub's model; download it")
    if folder.is_dir():
        stands_on, revision = checkpoint or name_base(folder), None
    else:
        stands_on, revision = source, commit_of(source, kwargs.get("revision"))
    return add_adapter(model, lora, stands_on, hparams.args.seed, revision), tokenizer
