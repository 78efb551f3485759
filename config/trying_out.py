"""Build what a training builds from its `training_args`, on a model of a few parameters: the libraries find mistakes.

It trains nothing and leaves nothing behind: no files, no state of accelerate's.
"""

import copy
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from huggingface_hub import get_token
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UserError, reading

logger = logging.getLogger(__name__)
STEPS = 10_000  # of a training whose length is not known yet
ABOUT_THE_MACHINE = ("install", "a GPU", "processes")  # in a message: another machine may have it
_elsewhere = ContextVar("elsewhere", default=False)


@contextmanager
def training_elsewhere() -> Iterator[None]:
    """Within it what this machine lacks is only warned of: a dry run's training may have another machine."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def warn_elsewhere(problem: str) -> None:
    """Raise `UserError` about something that this machine lacks; only warn of it within `training_elsewhere`."""
    if not _elsewhere.get():
        raise UserError(problem)
    logger.warning("%s (on this machine)", problem)


@contextmanager
def _trying(key: str) -> Iterator[None]:
    """Turn what a library raises within into a `UserError` about `key`, or a warning (see `training_elsewhere`)."""
    try:
        with reading(key):
            yield
    except UserError as error:
        if not any(sign in str(error) for sign in ABOUT_THE_MACHINE):
            raise
        warn_elsewhere(str(error))


@torch.random.fork_rng(devices=[])  # the weights of the small models are drawn
def try_out(args: Any, key: str) -> None:
    """Raise `UserError`, with a key in `key`, for what the libraries would refuse once the training begins."""
    from accelerate.utils import GradientAccumulationPlugin
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import Trainer
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
    from transformers.optimization import GreedyLR
    from transformers.utils import is_liger_kernel_available

    trainer: Any = Trainer.__new__(Trainer)  # its __init__ would start accelerate, and write to output_dir
    trainer.args, trainer.model = copy.copy(args), nn.Sequential(nn.Linear(2, 2))
    if args.optim_target_modules:  # of the real model
        trainer.args.optim_target_modules = "all-linear"
    trainer.optimizer = trainer.lr_scheduler = trainer.optimizer_cls_and_kwargs = None
    steps = args.max_steps if args.max_steps > 0 else STEPS
    with _trying(f"{key}.optim_args" if args.optim_args else f"{key}.optim {args.optim.value}"):
        trainer.create_optimizer()
        _refuse_ignored(trainer, key)
        _take_steps(trainer, key)
    if trainer.optimizer is None:  # its package is not installed
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=args.learning_rate)
    scheduler = (
        "lr_scheduler_kwargs" if args.lr_scheduler_kwargs else f"lr_scheduler_type {args.lr_scheduler_type.value}"
    )
    with reading(f"{key}.{scheduler}"):
        for name, value in (args.lr_scheduler_kwargs or {}).items():
            if isinstance(value, int | float) and not (0 <= value < math.inf or name == "last_epoch"):
                raise ValueError(f"{name} {value:g} is not a finite number of at least 0")
        trainer.create_scheduler(steps)
        factors = getattr(trainer.lr_scheduler, "lr_lambdas", [])
        rates = [args.learning_rate * f(step) for f in factors for step in (0, 1, steps // 2, steps - 1)]
        if isinstance(trainer.lr_scheduler, ReduceLROnPlateau | GreedyLR):
            for _ in range(4):  # what it compares and computes once it has waited
                trainer.lr_scheduler.step(1.0)
                trainer.lr_scheduler.patience = 0
            rates += [group["lr"] for group in trainer.optimizer.param_groups]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(f"the learning rate would be {min(rates):g} to {max(rates):g}")
    if args.max_steps > 0 and args.get_warmup_steps(steps) > steps:
        logger.warning("%s.warmup_steps %g is more than the %d steps of the training", key, args.warmup_steps, steps)
    with reading(f"{key}.report_to"):
        get_reporting_integration_callbacks(args.report_to)  # knows the names
    for tracker in sorted(set(args.report_to) - {*get_available_reporting_integrations(), "flyte"}):
        with _trying(f"{key}.report_to {tracker!r}"):
            raise ImportError("its package is not installed")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise UserError(f"{key}.push_to_hub needs a token of the hub, in the environment variable HF_TOKEN")
    needs: dict[str, tuple[str, Any]] = {
        "dataloader_persistent_workers": ("dataloader_num_workers above 0", args.dataloader_num_workers),
        "save_strategy": (
            "metric_for_best_model, to know the best",
            args.save_strategy != "best" or args.metric_for_best_model,
        ),
        "lr_scheduler_kwargs": ("another lr_scheduler_type", not args.lr_scheduler_type.value.startswith("constant")),
        "liger_kernel_config": ("use_liger_kernel: true", args.use_liger_kernel),
        "activation_offloading": ("a GPU", torch.accelerator.is_available()),
        "parallelism_config": ("several processes", int(os.environ.get("WORLD_SIZE", "1")) > 1),
    }
    for name, (needed, is_there) in needs.items():
        if getattr(args, name) and not is_there:
            with _trying(key):
                raise UserError(f"{key}.{name} needs {needed}")
    with reading(f"{key}.accelerator_config"):
        GradientAccumulationPlugin(**(args.accelerator_config.gradient_accumulation_kwargs or {}))
    if args.torch_compile:
        with reading(f"{key}.torch_compile_backend"):
            torch.compile(trainer.model, backend=args.torch_compile_backend)
        with reading(f"{key}.torch_compile_mode"):
            torch.compile(trainer.model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if args.activation_checkpointing_kwargs:
        with reading(f"{key}.activation_checkpointing_kwargs (formerly gradient_checkpointing_kwargs)"):
            example = torch.ones(2, requires_grad=True)
            checkpoint(trainer.model, example, **{"use_reentrant": False, **args.activation_checkpointing_kwargs})
    if args.use_liger_kernel and not is_liger_kernel_available():
        with _trying(f"{key}.use_liger_kernel"):
            raise ImportError("the package liger-kernel is not installed")
    attention = (args.model_init_kwargs or {}).get("attn_implementation")
    if attention is not None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        with reading(f"{key}.model_init_kwargs.attn_implementation"):
            AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8, **sizes), attn_implementation=attention)


def _refuse_ignored(trainer: Any, key: str) -> None:
    """Raise `UserError` for arguments that the optimizer would ignore."""

    def build(name: str, value: Any) -> str:
        """What the optimizer is built with if the argument `name` is `value`, or why it is not."""
        args = copy.copy(trainer.args)
        setattr(args, name, value)
        try:
            return str(trainer.get_optimizer_cls_and_kwargs(args, trainer.model))
        except Exception as error:
            return repr(error)

    def is_ignored(name: str, *others: Any) -> bool:
        return len({build(name, value) for value in (getattr(trainer.args, name), *others)}) == 1

    optim, texts = trainer.args.optim.value, (trainer.args.optim_args or "").split(",")
    for index, text in enumerate(filter(None, texts)):
        name = text.partition("=")[0]
        others = [[*texts[:index], *instead, *texts[index + 1 :]] for instead in ([], [f"{name}="])]
        if is_ignored("optim_args", *map(",".join, others)):
            raise UserError(f"{key}.optim_args: {name.strip()} is not an argument of optim {optim}")
    if trainer.args.optim_target_modules and is_ignored("optim_target_modules", None):
        raise UserError(f"{key}.optim_target_modules has no effect on optim {optim}")


def _take_steps(trainer: Any, key: str) -> None:
    """Raise `UserError` if gradients of ones make the weights infinite or NaN within three steps.

    Only of the optimizers that come with torch and transformers: others may need a GPU, a compiler or other steps.
    """
    args, weights = trainer.args, list(trainer.model.parameters())
    if type(trainer.optimizer).__module__.partition(".")[0] not in ("torch", "transformers"):
        return
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    for _ in range(3):
        trainer.optimizer.step()
    if not all(weight.isfinite().all() for weight in weights):
        settings = f"learning_rate {args.learning_rate:g}, weight_decay {args.weight_decay:g}"
        settings += f", optim_args {args.optim_args!r}" * bool(args.optim_args)
        raise UserError(f"{key}: with {settings} the weights would not stay finite numbers")


def check_fsdp(cls: Any, values: dict[str, Any], key: str) -> None:
    """Raise `UserError` if FSDP would refuse `values` on several processes. (Here there is one.)"""
    from accelerate.utils import FullyShardedDataParallelPlugin

    environment = dict(os.environ)
    try:
        with reading(f"{key}.fsdp_config"):
            # The library changes its mappings. What the other keys are about is checked without FSDP.
            names = ("fsdp", "fsdp_config", "bf16", "fp16", "use_cpu")
            given = {name: copy.deepcopy(values[name]) for name in names if name in values}
            plugin = cls(**{"bf16": False, "use_cpu": True} | given, activation_checkpointing=False).fsdp_plugin_args
            if plugin and plugin["fsdp_version"] == 2:  # the first version looks for devices
                FullyShardedDataParallelPlugin(**plugin)
    finally:  # FSDP_CPU_RAM_EFFICIENT_LOADING would make transformers load models for several processes
        os.environ.clear()
        os.environ.update(environment)
