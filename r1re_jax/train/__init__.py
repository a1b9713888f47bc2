"""The training run: SFT warm start, then GRPO; checkpoints, signals and evaluation around them."""
