"""Sampling from a model. The whole sequence is computed again for each token: there is no cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_data.batch import IGNORE, TokenBatch
from moe_parallel.model.transformer import Transformer
from moe_parallel.moe.routing import ForwardContext


def logits_of(model: Transformer) -> Callable[[TokenBatch], Tensor]:
    """What a whole model that no engine has split says of a batch on the host: logits (B, S, V)."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits(batch: TokenBatch) -> Tensor:
        was_training = model.training
        model.eval()
        logits_BSV, _stats = model(batch.to(device), ForwardContext(training=False))
        model.train(was_training)
        return logits_BSV

    return logits


def generate(
    logits: Callable[[TokenBatch], Tensor],
    prompt: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    allowed_ids: int | None = None,
) -> list[int]:
    """Continue a prompt by exactly `num_tokens` tokens.

    With experts or weights split over ranks, all ranks must call this with the same arguments: they run in lock
    step, which is also why no token ends the text early.

    Args:
        logits: (B, S, V) of a batch on the host: `Engine.logits`, or `logits_of` a model.
        prompt: at least one id.
        temperature: 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        seed: equal seeds give equal texts.
        allowed_ids: sample only ids below this; a head may have more rows than the tokenizer has ids.
    Returns:
        The new ids, without the prompt.
    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    _check(prompt, num_tokens, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(num_tokens):
        # Sampled on the host from float32, so that devices and ranks draw from the same stream.
        logits_V = logits(documents(torch.tensor([ids]), [len(ids)]))[0, -1].float().cpu()
        ids.append(_sample(logits_V[:allowed_ids], temperature, top_k, generator))
    return ids[len(prompt) :]


def _check(prompt: Sequence[int], num_tokens: int, temperature: float, top_k: int | None) -> None:
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token to start from")
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} must not be negative")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for all tokens")


def documents(token_BS: Tensor, lengths: list[int]) -> TokenBatch:
    """Sequences of one document each, (B, S), with padding behind the first `lengths` tokens of each."""
    batch, size = token_BS.shape
    place_S = torch.arange(size, device=token_BS.device)
    length_B = torch.tensor(lengths, device=token_BS.device)
    is_padding_BS = place_S >= length_B.unsqueeze(1)
    return TokenBatch(
        token_BS=token_BS.masked_fill(is_padding_BS, 0),
        target_BS=torch.full_like(token_BS, IGNORE),
        position_BS=place_S.expand(batch, size).masked_fill(is_padding_BS, 0),
        document_BS=torch.zeros_like(token_BS).masked_fill(is_padding_BS, -1),
        sequence_B=torch.zeros(batch, dtype=torch.int64),  # routers by lot: a row does not depend on its place
        source_B=torch.zeros(batch, dtype=torch.int64),
        document_lengths=tuple(tuple(n for n in (length, size - length) if n) for length in lengths),
        num_targets=0,
        num_valid=sum(lengths),
    )


def _sample(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if not bool(torch.isfinite(logits_V).all()):
        raise FloatingPointError("the logits are not finite")
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None:
        least = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    share_V = (logits_V / temperature).softmax(-1)
    return int(torch.multinomial(share_V, 1, generator=generator))
