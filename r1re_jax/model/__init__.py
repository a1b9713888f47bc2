"""The policy: a Qwen2-style decoder that works on a tree of guide, questions and completions."""
