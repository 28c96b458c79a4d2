"""Random numbers by hash: uniform, different for different purposes, the same everywhere."""

import torch

from moe_kernels.hashing import distinct_integers, hash_key, hashed_integer, hashed_uniform

INDEX = torch.arange(100_000)


def test_known_values():
    """The published splitmix64 from the seed 0: another constant or shift would change every initialization. Exact."""
    first = hashed_integer(torch.tensor([1, 2, 3]), 0).tolist()
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in first] == published


def test_uniform():
    """Mean 1/2 and variance 1/12 within 5 standard errors of 100,000 numbers (0.0046 and 0.0012), never an end."""
    number = hashed_uniform(INDEX, hash_key("a"))
    assert abs(float(number.mean()) - 0.5) < 0.0046
    assert abs(float(number.var()) - 1 / 12) < 0.0012
    assert 0 < float(number.min()) < float(number.max()) < 1


def test_keys_make_streams_of_their_own():
    """Purposes that share numbers would correlate weights with routing. 5 standard errors of a correlation: 0.016."""
    streams = [hashed_uniform(INDEX, hash_key(*parts)) for parts in (("a",), ("b",), ("a", 1), (1, "a"))]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(4, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.016
    assert hash_key("a", 1) == hash_key("a", 1)


def test_distinct_integers():
    """Each of the 20 unordered triples of 6 numbers comes equally often: 1000 +- 31 of 20,000, 5 sigma."""
    drawn = distinct_integers(INDEX[:20_000], hash_key("c"), 3, 6)
    assert all(len(set(row)) == 3 for row in drawn[:100].tolist())
    mask = torch.zeros(20_000, 6, dtype=torch.int64).scatter_(1, drawn, 1)
    counts = torch.bincount((mask * 2 ** torch.arange(6)).sum(1), minlength=64)
    counts = counts[counts > 0]
    assert counts.numel() == 20
    assert float((counts - 1000).abs().max()) < 5 * 31


def test_numbers_depend_on_their_index_alone():
    """Blocked or reordered, as on another layout: the same numbers. Exact."""
    number = hashed_uniform(INDEX, hash_key("a"))
    order = torch.randperm(INDEX.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hashed_uniform(INDEX[order], hash_key("a")), number[order])
    assert torch.equal(hashed_uniform(INDEX[500:900].view(20, 20), hash_key("a")).flatten(), number[500:900])


def test_every_bit_is_a_coin():
    """A shift that copies the sign leaves high bits one-sided, and low bits feed small limits. Each of 64 bits of
    100,000 numbers, and each bit of its exclusive or with the number before: 50,000 +- 158, 5 sigma."""
    drawn = hashed_integer(INDEX, hash_key("bits"))
    for value in (drawn, drawn ^ drawn.roll(1)):
        ones = torch.stack([(value >> bit & 1).sum() for bit in range(64)])
        assert int((ones - 50_000).abs().max()) < 5 * 158


def test_neighbors_of_one_index_do_not_share_draws():
    """Cells of neighboring tokens must not overlap: with a stride that is too small a token's draw would be that of the
    one before, moved by a place. Same expert by chance 1 in 16: 1250 +- 34 of 20,000, 5 sigma."""
    drawn = distinct_integers(INDEX[:20_000], hash_key("d"), 1, 16)[:, 0]
    for moved in range(16):
        assert abs(int(((drawn + moved) % 16 == drawn.roll(1)).sum()) - 1250) < 5 * 34


def test_never_an_end():
    """A number of exactly 1 makes an infinite weight. With the key 0 the largest hash is that of the index whose
    splitmix64 is all ones, which is -1 times its increment: found by inverting the mixing."""
    assert float(hashed_uniform(torch.tensor([-1]), 0).max()) < 1.0
    assert float(torch.tensor(2.0**53 - 1, dtype=torch.float64).add(0.5).mul(2.0**-53)) == 1.0  # what it would be
