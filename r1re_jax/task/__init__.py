"""What is learned: guides, examples, prompts, rewards, metrics; plain Python without jax."""
