"""The algorithm as pure functions: advantages, policy losses, KL terms, scoring over the tree."""
