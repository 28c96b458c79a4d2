"""What text tells of models: ridge regression, embeddings, gates, and the file between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_parallel.convert.fill import build_model
from moe_parallel.convert.upcycle.calibration import (
    EVALUATION,
    Calibration,
    Method,
    RidgeSums,
    collect,
    gate_router,
    load_calibration,
    mean_hidden,
    train_gates,
)
from moe_parallel.model.attention import AttentionPlan
from moe_parallel.model.transformer import Output
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.moe.routing import LayerContext
from tests.batches import make_batch
from tests.convert.models import DENSE, VOCABULARY, pretrained

DIM = 12
GENERATOR = torch.Generator().manual_seed(1)
DOMAINS = [torch.randn(n, DIM, generator=GENERATOR) + 2 * torch.randn(DIM, generator=GENERATOR) for n in (50, 31, 64)]
PADDED = [make_batch([[9, 5], [12]], 20, VOCABULARY), make_batch([[20], []], 20, VOCABULARY, 2)]
"""With padding within a row, and a row of nothing else."""


def sums_of(parts: list[tuple[torch.Tensor, int]]) -> RidgeSums:
    sums = RidgeSums(DIM, len(DOMAINS))
    for x_TD, domain in parts:
        sums.add(x_TD, domain)
    return sums


def test_ridge_is_least_squares_of_more_rows() -> None:
    """Would catch: a transposed solution, an offset without ridge, a norm that has the offset in it, a temperature that
    multiplies. numpy's least squares, with sqrt(ridge) times the identity as further rows, knows no normal equations;
    1e-9 is their condition number times 1e-16."""
    ridge, temperature = 0.3, 0.1
    x = np.concatenate([np.c_[part.double().numpy(), np.ones(len(part))] for part in DOMAINS])
    y = np.repeat(np.eye(len(DOMAINS)), [len(part) for part in DOMAINS], axis=0)
    more = np.sqrt(ridge) * np.eye(DIM + 1)
    wanted = np.linalg.lstsq(np.r_[x, more], np.r_[y, np.zeros((DIM + 1, len(DOMAINS)))], rcond=None)[0]
    wanted = wanted / np.linalg.norm(wanted[:-1], axis=0) / temperature
    rows, offsets = sums_of([(part, i) for i, part in enumerate(DOMAINS)]).solve(ridge, temperature)
    torch.testing.assert_close(rows, torch.from_numpy(wanted[:-1].T), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(offsets, torch.from_numpy(wanted[-1]), rtol=1e-9, atol=1e-9)


def test_sums_of_parts_are_the_sum() -> None:
    """Would catch: sums that depend on how the text is cut. 1e-13: another order of float64 sums."""
    whole = sums_of([(part, i) for i, part in enumerate(DOMAINS)])
    parts = sums_of([(DOMAINS[0][:20], 0), (DOMAINS[2], 2), (DOMAINS[1], 1), (DOMAINS[0][20:], 0)])
    for ours, theirs in ((parts.gram, whole.gram), (parts.target, whole.target)):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_separable_domains_are_routed_without_error() -> None:
    """Would catch: rows or offsets in the wrong order, an offset that the router does not add. The domains lie on
    different sides of planes that do not go through the origin."""
    centers = torch.eye(3, DIM) * 6 + 40
    parts = [center + torch.rand(60, DIM, generator=GENERATOR) for center in centers]
    rows, offsets = sums_of([(part, i) for i, part in enumerate(parts)]).solve(0.01, 1.0)
    router = TokenChoiceConfig(top_k=1, logit_offset=True).build(DIM, 3, with_bias=False).double()
    router.load_state_dict({"weight": rows, "offset": offsets})
    for domain, part in enumerate(parts):
        context = LayerContext(layer=0, batch_shape=(1, len(part)))
        assert (router.route(router(part.double(), context), context).choice.expert == domain).all()


def test_a_domain_without_text_is_refused() -> None:
    """Would catch: a division by zero that becomes a router of NaN."""
    with pytest.raises(ValueError, match="a domain has no text"):
        sums_of([(DOMAINS[0], 0), (DOMAINS[1], 1)]).solve(0.01, 1.0)


def test_collected_is_what_networks_see() -> None:
    """Would catch: inputs of attention instead, or from before the norm, those of another layer, padding that is
    counted. The first layer is run by its parts. 1e-12: the product is summed batch by batch."""
    model = build_model(DENSE, pretrained().weights, torch.float64).eval()
    sums = {layer: RidgeSums(DENSE.model.dim, 2) for layer in range(DENSE.model.num_layers)}
    collect(model, PADDED, 1, sums)
    seen = []
    with torch.no_grad():
        for batch in PADDED:
            block = model.blocks[0]
            plan: AttentionPlan = block.attention.plan(batch)
            x = model.embedding(batch.token_BS)
            x = block.ffn_norm(x + block.attention(block.attention_norm(x), plan))
            seen.append(x[batch.document_BS >= 0])
    x = torch.cat(seen)
    assert len(x) == 46
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    torch.testing.assert_close(sums[0].gram, x.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums[0].target[:, 1], x.sum(0), rtol=1e-12, atol=1e-12)
    assert float(sums[0].target[:, 0].abs().max()) == 0
    assert not torch.allclose(sums[0].gram, sums[1].gram)
    assert all(float(layer_sums.gram[-1, -1]) == 46 for layer_sums in sums.values())
    assert not block.ffn_norm._forward_hooks


def test_embedding_is_the_mean_of_valid_tokens() -> None:
    """Would catch: padding in the mean, a mean of means of batches of different lengths. 1e-12: order of sums."""
    model = build_model(DENSE, pretrained().weights, torch.float64).eval()
    with torch.no_grad():
        rows = [model(b, EVALUATION, Output.hidden)[0][b.document_BS >= 0] for b in PADDED]
    torch.testing.assert_close(mean_hidden(model, PADDED), torch.cat(rows).mean(0), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="no token"):
        mean_hidden(model, [])


def test_gates_begin_half_open_and_learn_alone() -> None:
    """Would catch: a gate on the stream instead of the network, weights that are trained along, gates that do not
    learn. At the start every gate is 1/2, as if `down` were halved: a power of two rounds nothing."""
    source = pretrained()
    model = build_model(DENSE, source.weights).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [make_batch([[20], [20]], 20, VOCABULARY)] * 20
    gates, losses = train_gates(model, batches, 0.05)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    halved = build_model(DENSE, source.weights).eval()
    with torch.no_grad():
        for block in halved.blocks:
            block.ffn.down.weight.mul_(0.5)
        half = halved(batches[0], EVALUATION, Output.loss)[0][0] / batches[0].num_targets
    assert losses[0] == float(half)
    assert losses[-1] < losses[0] - 0.1
    assert bool((gates.abs().amax(-1) > 0).all())
    assert not model.blocks[0].ffn._forward_hooks


def test_rows_of_gates_are_standardized() -> None:
    """Would catch: models and layers that change places, a scale of sqrt(D) that is left out. With standardized inputs
    a logit is sum of z(v) z(x) / sqrt(D), by layer norms of both. 1e-4: layer norm adds 1e-5 to the variance."""
    gates = [torch.randn(2, DIM, generator=GENERATOR) * scale for scale in (1, 50, 3)]
    tensors = gate_router(gates)
    assert set(tensors) == {"layers.0.weight", "layers.1.weight"}
    wanted = torch.stack([F.layer_norm(gate[1], (DIM,)) for gate in gates]) / DIM**0.5
    torch.testing.assert_close(tensors["layers.1.weight"], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="still what it was"):
        gate_router([torch.zeros(2, DIM)])


def test_file(tmp_path: Path) -> None:
    """Would catch: tensors or names that change on the way, a file of another method that is taken, one that is cut."""
    path = tmp_path / "file.safetensors"
    tensors = {"domains": torch.randn(2, 3, generator=GENERATOR, dtype=torch.float64)}
    Calibration(Method.domains, ["a", "b"], tensors).save(path)
    found = load_calibration(str(path), Method.domains)
    assert torch.equal(found.tensors["domains"], tensors["domains"].float())
    assert found.domains == ["a", "b"]
    with pytest.raises(ValueError, match=r"was made with --method domains, this start needs one of --method ridge"):
        load_calibration(str(path), Method.ridge)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"is no file of scripts/calibrate.py"):
        load_calibration(str(path), Method.domains)
    with pytest.raises(ValueError, match=r"is not a file; scripts/calibrate.py --method gates"):
        load_calibration(str(tmp_path / "none"), Method.gates)
