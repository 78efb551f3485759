"""Load a model and its tokenizer, for training and for inference."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import TemporaryError, UserError, one_line
from storage.hub import looks_like_path, quiet_lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_source(source: str, key: str) -> None:
    """Raise `UserError` for a path that leads to no model. (Only the hub can tell whether it has a model.)"""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{key} {source!r}: a folder without a config.json is no model")
    if not path.is_dir() and looks_like_path(source):
        raise UserError(f"{key} {source!r}: no such folder")


def load_model_and_tokenizer(
    source: str, key: str = "model_name", weights: bool = True, **model_init_kwargs: Any
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model with float32 weights (see `config/training_args.py`) and its tokenizer.

    `source` is a folder or a hub id, and `key` is its name in a `UserError`. `model_init_kwargs` go to the model's
    `from_pretrained`. Without `weights` only the config and the tokenizer are read, and the parameters have shapes but
    no values (torch's meta device).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_source(source, key)
    # These say where to look and how far to trust it, for the tokenizer as well.
    names = {"revision", "subfolder", "token", "trust_remote_code"} & model_init_kwargs.keys()
    shared = {name: model_init_kwargs[name] for name in names}
    try:
        with quiet_lookup():
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
            if weights:
                model = AutoModelForCausalLM.from_pretrained(source, **{"dtype": torch.float32, **model_init_kwargs})
            else:
                config, trust = AutoConfig.from_pretrained(source, **shared), bool(shared.get("trust_remote_code"))
                attention = {"attn_implementation": model_init_kwargs.get("attn_implementation")}
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(
                        config, dtype=torch.float32, trust_remote_code=trust, **attention
                    )
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise UserError(f"{key} {source!r}: {one_line(error)}") from error
        raise TemporaryError(
            f"{key} {source!r}: no such folder, and the hub does not give it: {one_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        # Labels are ours (-100 where unsupervised), so padding with EOS hides no EOS from the loss.
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
