"""`training_args` that TRL, transformers, accelerate or torch refuse late, or accept though they make no sense."""

import math
from typing import Any

from config_cases import _id, unique
from harness import Case

INF, NAN = math.inf, math.nan
STEPS = {"eval_strategy": "steps", "eval_steps": 1}
COSINE_MIN = {"lr_scheduler_type": "cosine_with_min_lr"}
PLATEAU = STEPS | {"lr_scheduler_type": "reduce_lr_on_plateau"}
CLIP = {"lr_scheduler_type": "polynomial"}

# A key and its wrong values; the line must say the key.
VALUES: dict[str, tuple[Any, ...]] = {
    "learning_rate": (-1.0, INF, -INF, NAN, "fast", True, [1e-4], 1e300),
    "num_train_epochs": (0, -1, INF, NAN, "3x", True),
    "max_steps": (0, -5, 1.5, "ten", INF, True, 2**62),
    "per_device_train_batch_size": (0, -1, 1.5, "4", 2**62),
    "per_device_eval_batch_size": (0, -2, 1.5),
    "gradient_accumulation_steps": (0, -1, 2.5, "x", 2**62),
    "max_grad_norm": (-1.0, NAN, "x"),
    "weight_decay": (-0.1, NAN, INF, "x"),
    "adam_beta1": (1.5, -0.1, 1.0, NAN),
    "adam_beta2": (1.0, -0.5, 2, NAN),
    "adam_epsilon": (-1e-8, NAN, INF),
    "warmup_steps": (-1, NAN, INF, "x"),
    "lr_scheduler_type": ("cosinus", 3, "", ["cosine"], "warmup_stable_decay", "cosine_with_min_lr", "reduce_lr_on_plateau"),
    "optim": ("adamw_troch", 3, "adamw_bnb_8bit", "adamw_8bit", "galore_adamw", "lomo", "apollo_adamw", "adamw_apex_fused",
              "adamw_torch_npu_fused", "schedule_free_adamw", "stable_adamw", "grokadamw", "adamw_torch_8bit", "adamw_torch_xla"),
    "optim_args": ("momentum", 3, ["a=b"], "foo=bar"),
    "optim_target_modules": ({"a": 1}, ["q_proj"]),
    "eval_strategy": ("sometimes", True, 3),
    "logging_strategy": ("never", True),
    "save_strategy": ("sometimes", 3, "best"),
    "logging_steps": (-1, 1.5, NAN, INF, "x", True),
    "seed": (-1, "x", 1.5, 2**64, True),
    "data_seed": (-1, "x", 1.5, True),
    "dataloader_num_workers": (-1, "two", 1.5),
    "dataloader_prefetch_factor": (4, -1),
    "dataloader_persistent_workers": (True, "x"),
    "dataset_num_proc": (0, -2, "x", 1.5),
    "neftune_noise_alpha": (NAN, INF, "x"),
    "torch_compile_backend": ("inductr", 3),
    "torch_compile_mode": ("max-speed",),
    "deepspeed": ("ds.json", {"zero_optimization": {"stage": 2}}, {}),
    "fsdp": ("full_shrd", 3, ["x"]),
    "fsdp_config": (3,),
    "accelerator_config": (
        "nowhere.json", {"split_batchs": True}, 3, {"even_batches": "x"}, {"split_batches": "maybe"},
        {"gradient_accumulation_kwargs": {"num_steps": 5, "sync_with_dataloader": "x"}},
    ),
    "activation_offloading": (True,),
    "include_for_metrics": (["bogus"],),
    "ddp_backend": ("gloom", 3),
    "use_cpu": ("yes", 1),
    "report_to": ("wandbb", "wandb", "tensorboard", ["mlflow"], "all things", 3),
    "push_to_hub": (True, "x"),
    "tf32": (True, "yes"),
    "fp16": ("yes",),
    "bf16": ("yes", 1),
    "log_level": ("loud", 30),
    "log_level_replica": ("loud",),
    "label_names": ("labels", [3]),
    "run_name": (3,),
    "output_dir": (3, ["x"]),
    "save_total_limit": ("x",),
    "eval_accumulation_steps": (1.5,),
    "torch_empty_cache_steps": (0, -1, 1.5),
    "use_liger_kernel": (True, "x"),
    "liger_kernel_config": ([1], {"rope": True}),
    "gradient_checkpointing_kwargs": ("x", {"use_reentrent": False}),
    "remove_unused_columns": ("x",),
    "disable_tqdm": ("x",),
    "ddp_timeout": ("x",),
    "hub_strategy": ("every_hour",),
    "hub_model_id": (3,),
    "include_num_input_tokens_seen": (3,),
    "train_sampling_strategy": ("by_length", 3),
    "full_determinism": ("x",),
    "lr_scheduler_kwargs": ("x", [1], {"foo": 1}, "{broken"),
    "model_init_kwargs": (
        "x", [1], "{broken", {"attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash"},
        {"attn_implementation": 3}, {"dtype": "bfloat16"}, {"dtype": "flot32"}, {"torch_dtype": 3},
        {"dtype": "float16"}, {"num_hidden_layers": "two"},
    ),
    "parallelism_config": ({"tp": 2}, {}),
    "metric_for_best_model": (3,),
    "jit_mode_eval": (True,),  # gone
    "overwrite_output_dir": (True,),
    "evaluation_strategy": ("no",),
    "warmup_ratio": (0.1,),
    "max_seq_length": (256,),
    "logging_dir": ("x",),
    "group_by_length": (True,),
    "learning_rte": (1e-4,),
    "load_best_model_at_end": (True,),
    "resume_from_checkpoint": ("x",),
    "do_train": (False,),
    "save_only_model": (True,),
}  # fmt: skip
SFT_VALUES: dict[str, tuple[Any, ...]] = {
    "packing": ("yes", 1),
    "packing_strategy": ("best", 3),
    "loss_type": ("sigmoid", 3, "nll2", ["nll"]),
    "label_smoothing_factor": (-0.1, 1.5, NAN),
    "assistant_only_loss": (True,),
    "beta": (0.1,),
    "dataset_text_field": ("x",),
    "padding_free": ("yes",),
    "eval_packing": ("x",),
}
DPO_VALUES: dict[str, tuple[Any, ...]] = {
    "label_smoothing": (-0.1, 0.3, 1.5, NAN),
    "f_divergence_type": ("kl", "KL", 3, ""),
    "f_alpha_divergence_coef": (NAN, "x", -1e30),
    "loss_weights": ([1.0, 0.5], [], "x", [NAN], [-1], [1e308]),
    "ld_alpha": (-1, 2, NAN),
    "discopop_tau": ("x",),
    "precompute_ref_batch_size": (0, -1),
    "ref_model_sync_steps": (1.5,),
    "sync_ref_model": (True,),
    "max_prompt_length": (3,),
    "reference_free": (True,),
    "is_encoder_decoder": (False,),
    "label_pad_token_id": (0,),
    "rpo_alpha": (1.0,),
    "packing": (True,),
    "loss_type": ("sigmoyd", ["x"], 3),
    "beta": (0, -0.1, INF, NAN, "x", 1e308),
    "padding_free": ("x",),
    "pad_token": ("x",),
}
# Several keys that contradict each other, and what the line must say.
TOGETHER: dict[str, tuple[str, dict[str, Any], str]] = {
    "fp16 and bf16": ("sft", {"fp16": True, "bf16": True}, "fp16"),
    "both for evaluations": ("sft", {"fp16_full_eval": True, "bf16_full_eval": True}, "full eval"),
    "evaluations every 0 steps": ("sft", STEPS | {"eval_steps": 0}, "eval_steps"),
    "evaluations every -1 steps": ("sft", STEPS | {"eval_steps": -1}, "eval_steps"),
    "evaluations every 1.5 steps": ("sft", STEPS | {"eval_steps": 1.5}, "eval_steps"),
    "evaluations every nan steps": ("sft", STEPS | {"eval_steps": NAN}, "eval_steps"),
    "evaluations every inf steps": ("sft", STEPS | {"eval_steps": INF}, "eval_steps"),
    "logs every 0 steps": ("sft", {"logging_strategy": "steps", "logging_steps": 0}, "logging_steps"),
    "saves every 0 steps": ("sft", {"save_strategy": "steps", "save_steps": 0}, "save_steps"),
    "saves every -1 steps": ("sft", {"save_strategy": "steps", "save_steps": -1}, "save_steps"),
    "saves every 1.5 steps": ("sft", {"save_strategy": "steps", "save_steps": 1.5}, "save_steps"),
    "saves every nan steps": ("sft", {"save_strategy": "steps", "save_steps": NAN}, "save_steps"),
    "best of no metric": ("sft", STEPS | {"save_strategy": "best", "metric_for_best_model": "nothing"}, "nothing"),
    "min_lr twice": ("sft", COSINE_MIN | {"lr_scheduler_kwargs": {"min_lr": 0.1, "min_lr_rate": 0.1}}, "min_lr"),
    "min_lr of another name": ("sft", COSINE_MIN | {"lr_scheduler_kwargs": {"minimum": 0.1}}, "lr_scheduler"),
    "min_lr as text": ("sft", COSINE_MIN | {"lr_scheduler_kwargs": {"min_lr": "x"}}, "lr_scheduler"),
    "polynomial ends above its start": ("sft", CLIP | {"lr_scheduler_kwargs": {"lr_end": 1.0}}, "lr"),
    "polynomial power as text": ("sft", CLIP | {"lr_scheduler_kwargs": {"power": "x"}}, "lr_scheduler"),
    "decay steps as text": (
        "sft",
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": "x"}},
        "lr_scheduler",
    ),
    **{
        f"plateau with {name} {value}": ("sft", PLATEAU | {"lr_scheduler_kwargs": {name: value}}, "lr_scheduler_kwargs")
        for name, value in [("patience", "a"), ("threshold", "x"), ("eps", "x"), ("cooldown", "x"), ("min_lr", "x"), ("factor", -0.5)]
    },
    "decay steps below 0": (
        "sft",
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": -5}},
        "num_decay_steps",
    ),
    "cycles of nan": ("sft", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": NaN}'}, "lr_scheduler_kwargs"),
    "constant with arguments": ("sft", {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs"),
    "momentum of nan": ("sft", {"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args"),
    "momentum of inf": ("sft", {"optim": "sgd", "optim_args": "momentum=inf"}, "optim_args"),
    "unknown argument of rmsprop": ("sft", {"optim": "rmsprop", "optim_args": "foo=1"}, "foo"),
    "unknown key of FSDP": ("sft", {"fsdp": True, "fsdp_config": {"fsdp_foo": 1}}, "fsdp_foo"),
    "no loss has a weight": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0, 0]}, "loss_weights"),
    "plateau without a metric": ("sft", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
    "GaLore without modules": ("sft", {"optim": "galore_adamw"}, "optim"),
    "compiled by nobody": ("sft", {"torch_compile": True, "torch_compile_backend": "nobody"}, "nobody"),
    "FSDP and DeepSpeed": ("sft", {"fsdp": True, "deepspeed": {"train_batch_size": 1}}, "deepspeed"),
    "packs that are cut": ("sft", {"packing": True, "packing_strategy": "wrapped", "eval_packing": False}, "packing"),
    "length twice": ("sft", {"max_length": 128}, "max_length"),
    "length twice, DPO": ("dpo", {"max_length": 128}, "max_length"),
    "beta twice": ("dpo", {"beta": 0.2}, "beta"),
    "weights for one loss": ("dpo", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "loss_weights"),
    "no smoothing of hinge": ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    "robust at a half": ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing"),
    "aot with a divergence": ("dpo", {"loss_type": "aot", "f_divergence_type": "js_divergence"}, "f_divergence_type"),
    "apo_zero with a divergence": ("dpo", {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
    "sppo with a divergence": ("dpo", {"loss_type": "sppo_hard", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
    "nca with a divergence": ("dpo", {"loss_type": "nca_pair", "f_divergence_type": "alpha_divergence"}, "f_divergence_type"),
    "a moving reference that is computed once": ("dpo", {"sync_ref_model": True}, "sync_ref_model"),
    "a reference that moves every 0 steps": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 0, "precompute_ref_log_probs": False}, "ref_model_sync_steps"),
    "a mixture above 1": ("dpo", {"sync_ref_model": True, "ref_model_mixup_alpha": 7.0, "precompute_ref_log_probs": False}, "ref_model_mixup_alpha"),
    "discopop with tau 0": ("dpo", {"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
    "prefetch without workers": ("sft", {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 0}, "dataloader_prefetch_factor"),
    "workers that stay, without workers": ("sft", {"dataloader_persistent_workers": True, "dataloader_num_workers": 0}, "dataloader_persistent_workers"),
    "a schedule of no steps": ("sft", {"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs"),
    "all steps are skipped": ("sft", {"max_steps": 2, "warmup_steps": -3}, "warmup_steps"),
}  # fmt: skip
# What else has to be set for these keys to count.
ALONE: dict[str, dict[str, Any]] = {
    "num_train_epochs": {"max_steps": -1},
    "gradient_checkpointing_kwargs": {"activation_checkpointing": True},
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
}
# Keys that may be reported under another name, and what the line must say for them.
SAYS = {
    "loss_type": "loss",  # dpo_loss
    "torch_compile_backend": "torch_compile",
    "torch_compile_mode": "torch_compile",
    "accelerator_config": "training_args",  # with the file, or the unknown keyword
    "gradient_checkpointing_kwargs": "checkpointing_kwargs",
}


def _case(config: str, key: str, value: Any) -> Case:
    change = {f"hyperparameters.training_args.{name}": other for name, other in ALONE.get(key, {}).items()}
    if config == "dpo" and key in (
        "beta",
        "loss_type",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "sync_ref_model",
    ):
        change["hyperparameters.dpo_beta"] = None  # which sets the same
    if key == "sync_ref_model":
        change["hyperparameters.precompute_ref_log_probs"] = True
    change[f"hyperparameters.training_args.{key}"] = value
    says = SAYS.get(key, key)
    return Case(f"args {config}/{_id(key, value)}", says, config=config, change=change)


def _together(name: str, config: str, values: dict[str, Any], says: str) -> Case:
    change = {f"hyperparameters.training_args.{key}": value for key, value in values.items()}
    if "precompute_ref_log_probs" in values:
        change["hyperparameters.precompute_ref_log_probs"] = None
    return Case(f"args/{name}", says, config=config, change=change)


CASES = unique(
    [
        *(_case("sft", key, value) for key, values in (VALUES | SFT_VALUES).items() for value in values),
        *(_case("dpo", key, value) for key, values in DPO_VALUES.items() for value in values),
        *(_together(name, *case) for name, case in TOGETHER.items()),
    ]
)
