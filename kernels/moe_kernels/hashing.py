"""Random numbers without a generator: a hash of what the number is for.

A number that depends on a key and an index alone is the same on every layout, in every order, and when a pass is
computed a second time.
"""

import hashlib

import torch
from torch import Tensor


def hash_key(*parts: object) -> int:
    """A 64-bit number, as a signed integer, that is as good as independent for different parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def hashed_integer(index: Tensor, key: int) -> Tensor:
    """int64 -> int64, uniform over all 64 bits. splitmix64 (Steele, Lea, Flood 2014) with the key as its start."""
    # int64 arithmetic wraps.
    z = index * -0x61C8864680B583EB + key
    z = (z ^ _shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift(z, 31)


def hashed_uniform(index: Tensor, key: int) -> Tensor:
    """int64 -> float64 in (0, 1), never at its ends."""
    # The largest number rounds up to 1.
    return _shift(hashed_integer(index, key), 11).double().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 shifts copy the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def distinct_integers(index_N: Tensor, key: int, count: int, limit: int) -> Tensor:
    """`count` different integers below `limit` for each index, uniform: (N) -> int64 (N, count).

    Each of the `limit` integers gets a hashed place; the first `count` in that order are taken.
    """
    cell_NE = index_N.unsqueeze(-1) * limit + torch.arange(limit, device=index_N.device)
    return hashed_integer(cell_NE, key).topk(count, dim=-1).indices
