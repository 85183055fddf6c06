"""Perplexity, for whoever prefers it to a loss."""

import math


def perplexity(loss: float) -> float:
    """e^loss, a token; infinite where a float cannot hold it (a loss beyond 709 nats, of a run that diverged)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
