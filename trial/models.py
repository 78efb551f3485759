"""Load a model and its tokenizer, for training and for inference."""

import os
import warnings
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from config.cluster_names import is_cluster_name
from errors import TemporaryError, UserError, about, one_line, os_errors_of, reading
from storage.adapter_chains import CONFIG as ADAPTER_CONFIG
from storage.adapter_chains import find_base, is_adapter, read_chain
from storage.checkpoints import find_checkpoint_here
from storage.files import refuse_special_files
from storage.hub import check_hub_id, looks_like_path, no_such, quiet_lookup
from storage.manifests import check_files
from storage.origins import FILE as ORIGIN
from storage.origins import Origin, read_origin
from trial.events import read_events

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken*")

GENERATION_CONFIG = "generation_config.json"
WITH_KWARGS = " with its model_init_kwargs"
ONLY_AN_ADAPTER = ": it is an adapter, not a whole model; hf download {} --local-dir FOLDER, and give the folder"
MOST_LAYERS = 1000
WHERE = ("revision", "subfolder", "token")
# What `generate` ignores without `do_sample`, but `save_pretrained` then refuses.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def find_model(source: str, key: str) -> str:
    """Return the folder or hub id of a SOURCE; download it first if it is on a cluster. Raises `UserError`."""
    with os_errors_of(key):  # a name that is too long, for example
        exists = Path(source).exists()
    looks_like_uuid = len(source) == 36 and source.count("-") == 4
    if not exists and (looks_like_uuid or is_cluster_name(source)):
        from storage.cluster_checkpoints import checkpoint_folder

        folder = checkpoint_folder(source, key)
        if is_adapter(folder):
            with about(f"{key} {source}"):
                find_base(read_chain(folder), find_checkpoint_here)
        return str(folder)
    check_model(source, key)
    return source


def choose_device(name: str | None, key: str) -> "torch.device":
    """Return the device `name`; None: the best one. Raises `UserError` if this machine does not have it."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{key} {name!r}: not on this machine ({str(error).splitlines()[0][:80]})") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"{key} {name!r}: it cannot generate; choose cpu, cuda or mps")
    return device


def check_source(source: str, key: str, subfolder: str = "") -> None:
    """Raise `UserError` for a path that leads to no model. (Only the hub can tell whether it has a model.)"""
    path = Path(source, subfolder)
    what = f"{key} {str(path)!r}" if subfolder else f"{key} {source!r}"
    refuse_special_files(path, what)
    if path.is_dir() and not ((path / "config.json").is_file() or is_adapter(path)):
        raise UserError(f"{what}: a folder without a config.json is no model{_meant(path)}")
    if not path.is_dir() and (looks_like_path(source) or Path(source).exists()):
        raise UserError(f"{what}: {'not a folder' if path.exists() else no_such('folder')}")
    if not path.is_dir():
        check_hub_id(source, what)


def check_model(source: str, key: str, **model_init_kwargs: Any) -> None:
    """Raise `UserError` if `source` is no model, as far as that shows without loading it.

    The weights in a folder must be there and have whole headers; the hub, or its cache on this machine, must have the
    id (else it is a `TemporaryError`).
    """
    where = {name: model_init_kwargs[name] for name in WHERE if model_init_kwargs.get(name)}
    subfolder = where.get("subfolder", "")
    check_source(source, key, subfolder)
    folder = Path(source, subfolder)
    if not folder.is_dir():
        return _find_on_hub(source, key, **where)
    with about(f"{key} {str(folder)!r}"):
        if is_adapter(folder):
            chain = read_chain(folder)
            base = find_base(chain, find_checkpoint_here)
            check_model(base, "its base", revision=chain.revision)
        else:
            check_files(folder, [WEIGHT_FILES], lambda name: fnmatch(name, "*.safetensors*") and "/" not in name)


def _find_on_hub(source: str, key: str, **where: Any) -> None:
    from transformers.utils import cached_file

    try:
        with reading(f"{key} {source!r}"), quiet_lookup():
            cached_file(source, "config.json", **where)
    except UserError as error:
        raise _not_given(source, key, error) from error


def _not_given(source: str, key: str, error: UserError) -> UserError:
    from transformers.utils import cached_file

    what = f"{key} {source!r}"
    with suppress(Exception), quiet_lookup():
        if cached_file(source, ADAPTER_CONFIG):
            return UserError(f"{what}{ONLY_AN_ADAPTER.format(source)}")
    said = str(error).removeprefix(what).removeprefix(WITH_KWARGS).removeprefix(": ")
    return TemporaryError(f"{what}: {no_such('folder')}, and the hub does not give it: {said}")


def _meant(folder: Path) -> str:
    """Return what to give instead of a folder that only leads to a model, in words; "" if it does not."""
    best = folder / "best_checkpoint"
    if best.is_file():
        return f"; the best checkpoint of the experiment in it is {one_line(best.read_text(errors='replace'))[:36]}"
    saved = [event["uuid"] for event in read_events(folder / "events.jsonl") if event["kind"] == "checkpoint"]
    if saved:
        return f"; the latest checkpoint of the trial in it is {saved[-1]}"
    configs = [*folder.glob("*/*config.json"), *folder.glob("*/*/*config.json")]
    models = sorted(path.parent for path in configs if path.name in ("config.json", ADAPTER_CONFIG))
    return f"; {models[-1]} is one" if models else ""


def load_model_and_tokenizer(
    source: str, key: str = "model_name", weights: bool = True, merge: bool = True, **model_init_kwargs: Any
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model with float32 weights (see `config/training_args.py`) and its tokenizer.

    `source` is a folder or a hub id, and `key` is its name in a `UserError`. `model_init_kwargs` go to the model's
    `from_pretrained`. Without `weights` only the config and the tokenizer are read, and the parameters have shapes but
    no values (torch's meta device).

    The folder may be of an adapter. Then its adapters are merged in float32 into the model that they stand on. Without
    `merge` they stay apart, frozen: the model is an `AdapterStack`.
    """
    folder, what = Path(source, model_init_kwargs.get("subfolder") or ""), f"{key} {source!r}"
    if not is_adapter(folder):
        model, tokenizer = _load_whole_model(source, key, weights, **model_init_kwargs)
        _check_fit(model, tokenizer, what)
        return model, tokenizer
    import torch

    from adapters.four_bit import round_to_4bit
    from adapters.stack import base_model, merge_adapters, stack_adapters

    given = {name: value for name, value in model_init_kwargs.items() if name not in ("revision", "subfolder")}
    dtype = given.get("dtype", torch.float32)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a YAML has its name
    if merge:
        given["dtype"] = torch.float32  # in which nothing of an adapter is lost
    with about(what):
        chain = read_chain(folder)
        base = find_base(chain, find_checkpoint_here)
        # PeftModel.save_pretrained leaves the tokenizer to others: then it is the base's.
        own_tokenizer = str(folder) if _has_tokenizer(folder) else None
        if chain.revision:
            given["revision"] = chain.revision
        model, tokenizer = _load_whole_model(base, "its base", weights, own_tokenizer, **given)
        # What one adapter was trained on is what all above it stand on.
        rounded_from = next((o.rounded_from for o in map(_read_origin, chain.adapters) if o and o.rounded_from), None)
        if weights and rounded_from and "quantization_config" not in given:
            round_to_4bit(model, getattr(torch, rounded_from))
        if not merge:
            model = cast(Any, stack_adapters(model, chain.adapters))
        elif weights:
            model = merge_adapters(model, chain.adapters).to(dtype).requires_grad_(True)
        else:
            model = cast(Any, stack_adapters(model, chain.adapters)).unload().requires_grad_(True)
    if (folder / GENERATION_CONFIG).is_file():
        with reading(f"{what}: {GENERATION_CONFIG}"), quiet_lookup():
            model.generation_config = type(model.generation_config).from_pretrained(str(folder))
    _mend_generation_config(model, what)
    _check_fit(base_model(model), tokenizer, what)
    return model, tokenizer


def _read_origin(adapter: Path) -> Origin | None:
    origin = read_origin(adapter)
    if origin is None and (adapter / ORIGIN).exists():
        raise UserError(f"{adapter / ORIGIN} is damaged: it says whether the weights under the adapter had 4 bits")
    return origin


def _has_tokenizer(folder: Path) -> bool:
    return any(file for name in TOKENIZER_FILES for file in folder.glob(name))


def _load_whole_model(
    source: str, key: str, weights: bool, tokenizer_folder: str | None = None, **model_init_kwargs: Any
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load what `load_model_and_tokenizer` does of a model that is no adapter; `tokenizer_folder` may have another."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.quantizers import AutoHfQuantizer

    what, subfolder = f"{key} {source!r}", model_init_kwargs.get("subfolder") or ""
    check_source(source, key, subfolder)
    folder = Path(tokenizer_folder or Path(source, subfolder))
    if folder.is_dir() and not _has_tokenizer(folder):
        raise UserError(f"{what}: it has no tokenizer")  # transformers would make an empty one
    # These say where to look and how far to trust it, for the tokenizer as well.
    shared = {name: model_init_kwargs[name] for name in (*WHERE, "trust_remote_code") if name in model_init_kwargs}
    try:
        kwargs = WITH_KWARGS if model_init_kwargs.keys() - {"dtype", "trust_remote_code"} else ""
        own = "its tokenizer" if tokenizer_folder else what + kwargs
        with reading(own), quiet_lookup(), warnings.catch_warnings(action="ignore"):
            where = {} if tokenizer_folder else shared
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or source, **where)
        with reading(what + kwargs), quiet_lookup(), warnings.catch_warnings(action="ignore"):
            if weights:
                given = {"dtype": torch.float32, **model_init_kwargs, "output_loading_info": True}
                model, info = cast(Any, AutoModelForCausalLM).from_pretrained(source, **given)
            else:
                without = {k: v for k, v in model_init_kwargs.items() if k not in ("dtype", "quantization_config")}
                config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **without)
                if getattr(config.get_text_config(), "num_hidden_layers", 1) > MOST_LAYERS:
                    raise ValueError(f"its config.json says that it has more than {MOST_LAYERS} layers")
                if quantization := getattr(config, "quantization_config", None):
                    AutoHfQuantizer.from_config(quantization)  # knows the methods
                trust = bool(shared.get("trust_remote_code"))
                attention = {"attn_implementation": model_init_kwargs.get("attn_implementation")}
                with torch.device("meta"):
                    dtype = model_init_kwargs.get("dtype", torch.float32)
                    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust, **attention)
    except UserError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(f"{what}: its weights have other shapes than its config.json says") from error
        if Path(source).exists():
            raise
        raise _not_given(source, key, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers adds an adapter to the base that it names
        raise UserError(f"{what}{ONLY_AN_ADAPTER.format(source)}")
    if weights and os.environ.get("LOCAL_RANK", "0") == "0":  # under FSDP the others load nothing
        _check_weights(model, info, what)
    _mend_generation_config(model, what)
    if tokenizer.pad_token_id is None:
        # Labels are ours (-100 where unsupervised), so padding with EOS hides no EOS from the loss.
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _check_fit(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", what: str) -> None:
    """Raise `UserError` if the model cannot answer with this tokenizer, or a token of the tokenizer's has no embedding.

    (Others that were added may be meant for another model: Gemma 3's tokenizer has one for pictures.)
    """
    config: Any = model.config.get_text_config()
    if getattr(config, "num_hidden_layers", 1) < 1:
        raise UserError(f"{what}: its config.json says that it has no layer")
    if not isinstance(window := getattr(config, "sliding_window", None), int | None):  # Gemma has none, nor checks it
        raise UserError(f"{what}: its config.json says sliding_window {window!r}, which is no number")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{what}: its tokenizer has no EOS token, so answers would never end")
    rows: Any = model.get_input_embeddings().num_embeddings
    with reading(what):
        used = tokenizer("Tea?")["input_ids"]
    last = max(tokenizer.vocab_size - 1, tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0, *used)
    if last >= rows:
        raise UserError(f"{what}: the model has {rows} embeddings, but its tokenizer's ids go up to {last}")
    name, named = type(model).__name__, model.config.architectures or []
    if not getattr(model.config, "is_decoder", True) and named and name not in named:  # BERT's, which sees what follows
        raise UserError(f"{what}: it is a {', '.join(map(str, named))}, not a causal language model")


def _mend_generation_config(model: "PreTrainedModel", what: str) -> None:
    """Have the model's generation config be one that can be saved with a checkpoint. Raises `UserError` if it cannot.

    The hub has many that name a temperature for greedy decoding. transformers reads these, but does not write them.
    """
    config: Any = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        for name in SAMPLING if not config.do_sample else ():
            setattr(config, name, None)
        with reading(f"{what}: generation_config.json"):
            config.validate(strict=True)


def _check_weights(model: "PreTrainedModel", info: dict[str, Any], what: str) -> None:
    """Raise `UserError` unless every weight was in the files (transformers draws others at random) and is a number.

    (A `device_map` leaves some on the disk, and the meta device in their place.)
    """
    import torch

    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{what}: its files lack {len(missing)} of the model's weights, such as {missing[0]}")
    for name, weight in model.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight.sum(dtype=torch.float32)):
            raise UserError(f"{what}: its weight {name} has NaN or infinite values")
