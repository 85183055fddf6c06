"""Text from a trained model."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain.data import Tokenizer

NextLogits = Callable[[Tensor], Tensor]
"""Tokens int64 [T] to the logits of the next one, [V]."""


def sample_text(
    next_logits: NextLogits,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    context: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> str:
    """Continue `prompt` until the model ends the document or `max_tokens` are written.

    Args:
        next_logits: The model.
        tokenizer: Its tokenizer; tokens that it does not know are never drawn.
        prompt: Text to continue; empty text begins a document.
        max_tokens: Tokens to write, at most.
        context: Tokens the model can look back on; older ones are dropped.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; None: from all.
        seed: Of the draws; the same seed gives the same text.

    Returns:
        The continuation, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [tokenizer.end_of_document, *tokenizer.encode(prompt).tolist()]
    written: list[int] = []
    while len(written) < max_tokens:
        logits = next_logits(torch.tensor(tokens[-context:])).float().cpu()[: tokenizer.vocab_size]
        token = _draw(logits, temperature, top_k, generator)
        if token == tokenizer.end_of_document:
            break
        tokens.append(token)
        written.append(token)
    return tokenizer.decode(written)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
