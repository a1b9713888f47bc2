"""How completions are drawn: sampling, random keys, jitted decoding, questions to completions."""
