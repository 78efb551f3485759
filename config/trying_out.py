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
_elsewhere = ContextVar("elsewhere", default=False)


@contextmanager
def training_elsewhere() -> Iterator[None]:
    """Within it a package that is not installed is only warned of: a dry run's training may have another machine."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


@contextmanager
def _trying(key: str) -> Iterator[None]:
    """Turn what a library raises within into a `UserError` about `key`, or a warning (see `training_elsewhere`)."""
    try:
        with reading(key):
            yield
    except UserError as error:
        if not (_elsewhere.get() and "install" in str(error)):
            raise
        logger.warning("%s (on this machine)", error)


@torch.random.fork_rng(devices=[])  # the weights of the small models are drawn
def try_out(args: Any, key: str) -> None:
    """Raise `UserError`, with a key in `key`, for what the libraries would refuse once the training begins."""
    from accelerate.utils import GradientAccumulationPlugin
    from transformers import Trainer
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    trainer: Any = Trainer.__new__(Trainer)  # its __init__ would start accelerate, and write to output_dir
    trainer.args, trainer.model = copy.copy(args), nn.Sequential(nn.Linear(2, 2))
    if args.optim_target_modules:  # of the real model
        trainer.args.optim_target_modules = "all-linear"
    trainer.optimizer = trainer.lr_scheduler = trainer.optimizer_cls_and_kwargs = None
    steps = args.max_steps if args.max_steps > 0 else STEPS
    with _trying(f"{key}.optim_args" if args.optim_args else f"{key}.optim {args.optim.value}"):
        trainer.create_optimizer()
    if trainer.optimizer is None:  # its package is not installed
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=args.learning_rate)
    scheduler = (
        "lr_scheduler_kwargs" if args.lr_scheduler_kwargs else f"lr_scheduler_type {args.lr_scheduler_type.value}"
    )
    with reading(f"{key}.{scheduler}"):
        trainer.create_scheduler(steps)
        factors = getattr(trainer.lr_scheduler, "lr_lambdas", [])
        rates = [args.learning_rate * f(step) for f in factors for step in (0, 1, steps // 2, steps - 1)]
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
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError(f"{key}.dataloader_persistent_workers needs dataloader_num_workers above 0")
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
