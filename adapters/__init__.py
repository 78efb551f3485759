"""LoRA adapters: stacked on a frozen model for training, merged into it for everything else."""
