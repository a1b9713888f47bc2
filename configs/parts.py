"""Parts that recipes share."""


def evaluate_all(*, batch: int, at_start: bool) -> dict[str, object]:
    """Avg@4 at temperature 1 and a greedy completion, when a phase ends.

    Args:
        batch: examples at a time.
        at_start: whether to measure the policy before the first step too.
    """
    return dict(every=0, samples=4, temperature=1.0, greedy=True, batch=batch, at_start=at_start)
