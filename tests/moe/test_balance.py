"""Balance losses and the bias rule against closed forms.

1. values at balance and at collapse   2. scopes   3. gradient   4. padding   5. the loss-free rule
"""

import pytest
import torch

from moe_parallel.moe.balance import (
    BalanceConfig,
    DeviceScope,
    Level,
    balance_loss_sum,
    balance_terms,
    bias_step,
    z_loss_sum,
)
from moe_parallel.moe.routing import Choice, ForwardContext, LayerContext, Ranks, normalized_counts


def one_hot_scores(experts, num_experts):
    return torch.nn.functional.one_hot(torch.tensor(experts), num_experts).double()


def terms(config, score_TE, expert_TK, shape, valid_T=None, **forward):
    context = LayerContext(layer=0, batch_shape=shape, valid_T=valid_T, forward=ForwardContext(**forward))
    found = balance_terms(config, (Level(score_TE),), Choice(expert_TK), score_TE.shape[1], context)
    return found.weighted, found.value, found.step_count_E, found.used_share_E


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_at_balance_whatever_k(top_k):
    """Codebases differ by a factor k here, which makes a coefficient mean nothing. Exact: all terms are 1/8."""
    num_tokens = 16
    expert_TK = (torch.arange(num_tokens)[:, None] * top_k + torch.arange(top_k)) % 8
    score_TE = torch.full((num_tokens, 8), 1 / 8, dtype=torch.float64)
    for name in ("sequence", "micro_batch", "data_parallel", "global"):
        config = BalanceConfig(**{f"{name}_coefficient": 0.5})
        weighted, value, _, _ = terms(config, score_TE, expert_TK, (1, num_tokens))
        assert float(value) / num_tokens == pytest.approx(1.0, abs=1e-15)
        assert float(weighted) / num_tokens == pytest.approx(0.5, abs=1e-15)


def test_collapse_costs_experts_over_k():
    """All tokens to the same k of E experts, with all probability on them: E / k (the maximum at these loads)."""
    expert_TK = torch.tensor([[0, 1]] * 10)
    score_TE = torch.zeros(10, 8, dtype=torch.float64)
    score_TE[:, :2] = 0.5
    _, value, _, _ = terms(BalanceConfig(micro_batch_coefficient=1.0), score_TE, expert_TK, (2, 5))
    assert float(value) / 10 == pytest.approx(8 / 2, abs=1e-14)


def test_specialized_domains_cost_nothing_globally():
    """Four domain-pure micro-batches, each with two experts of its own: 4.0 per micro-batch, 1.0 over the batch.

    The closed form of arXiv 2501.11873's argument; a global loss that only sees its own micro-batch gives 4."""
    total_E = torch.zeros(8, dtype=torch.float64)
    batches = []
    for domain in range(4):
        expert_TK = torch.tensor([[2 * domain], [2 * domain + 1]] * 4)
        batches.append((one_hot_scores(expert_TK.flatten().tolist(), 8), expert_TK))
        total_E += torch.bincount(expert_TK.flatten(), minlength=8)
    for score_TE, expert_TK in batches:
        _, micro, _, _ = terms(BalanceConfig(micro_batch_coefficient=1.0), score_TE, expert_TK, (1, 8))
        assert float(micro) / 8 == pytest.approx(4.0, abs=1e-14)
        exact = {"prior_count_LIE": total_E[None, None], "prior_is_total": True}
        _, value, _, used_E = terms(BalanceConfig(global_coefficient=1.0), score_TE, expert_TK, (1, 8), **exact)
        assert float(value) / 8 == pytest.approx(1.0, abs=1e-14)
        torch.testing.assert_close(used_E, normalized_counts(total_E), rtol=0, atol=0)


def test_buffered_counts_approach_the_global_value():
    """With the counts so far as the prior the same batches cost 4, 2, 4/3, 1: the order bias of a plain buffer."""
    seen_E = torch.zeros(8, dtype=torch.float64)
    values = []
    for domain in range(4):
        expert_TK = torch.tensor([[2 * domain], [2 * domain + 1]] * 4)
        score_TE = one_hot_scores(expert_TK.flatten().tolist(), 8)
        config = BalanceConfig(global_coefficient=1.0)
        _, value, step_count_E, _ = terms(config, score_TE, expert_TK, (1, 8), prior_count_LIE=seen_E[None, None])
        seen_E = seen_E + step_count_E
        values.append(float(value) / 8)
    assert values == pytest.approx([4.0, 2.0, 4 / 3, 1.0], abs=1e-14)


def test_sequence_scope_is_the_mean_over_sequences():
    """Two sequences, each collapsed on its own experts: the batch is balanced, the sequences are not."""
    expert_TK = torch.tensor([[0], [0], [1], [1]])
    score_TE = one_hot_scores([0, 0, 1, 1], 2)
    _, sequence, _, _ = terms(BalanceConfig(sequence_coefficient=1.0), score_TE, expert_TK, (2, 2))
    _, micro, _, _ = terms(BalanceConfig(micro_batch_coefficient=1.0), score_TE, expert_TK, (2, 2))
    assert float(sequence) / 4 == pytest.approx(2.0)
    assert float(micro) / 4 == pytest.approx(1.0)


def test_several_scopes_add_up():
    """Each configured loss enters with its own weight."""
    expert_TK = torch.tensor([[0], [0], [1], [1]])
    score_TE = one_hot_scores([0, 0, 1, 1], 2)
    config = BalanceConfig(sequence_coefficient=0.1, micro_batch_coefficient=0.01)
    weighted, _, _, _ = terms(config, score_TE, expert_TK, (2, 2))
    assert float(weighted) / 4 == pytest.approx(0.1 * 2 + 0.01 * 1)


def test_gradient_flows_through_scores_only():
    """d/dp of E * f . p is E * f: the shares must be constants of the loss."""
    score_E = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    share_E = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64, requires_grad=True)
    balance_loss_sum(share_E, score_E).backward()
    torch.testing.assert_close(score_E.grad, 3 * share_E.detach(), rtol=0, atol=0)
    assert share_E.grad is None


def test_padding_is_in_neither_factor():
    """Padding in the counts or in the scores makes the loss depend on how full the batch is."""
    g = torch.Generator().manual_seed(0)
    score_TE = torch.softmax(torch.randn(6, 4, generator=g, dtype=torch.float64), -1)
    expert_TK = score_TE.topk(2).indices
    valid_T = torch.tensor([True, True, True, True, False, False])
    for name in ("sequence", "micro_batch", "data_parallel", "global"):
        config = BalanceConfig(**{f"{name}_coefficient": 1.0})
        padded = terms(config, score_TE, expert_TK, (1, 6), valid_T)[0]
        alone = terms(config, score_TE[:4], expert_TK[:4], (1, 4))[0]
        assert float(padded) == pytest.approx(float(alone), rel=1e-15)


def test_z_loss():
    """Closed form: E equal logits c have log-sum-exp c + log E; the padding row must not count."""
    logit_TE = torch.full((3, 4), 2.0, dtype=torch.float64)
    valid_T = torch.tensor([True, True, False])
    wanted = 2 * (2.0 + torch.log(torch.tensor(4.0, dtype=torch.float64))) ** 2
    assert float(z_loss_sum(logit_TE, valid_T)) == pytest.approx(float(wanted), rel=1e-15)


def test_bias_step_signs():
    """Overloaded experts go down, underloaded up, the mean stays; the wrong sign diverges."""
    new = bias_step(torch.zeros(3), torch.tensor([10, 4, 1]), 0.01)
    assert new.tolist() == pytest.approx([-0.01, 0.01, 0.01])
    assert bias_step(torch.zeros(3), torch.tensor([5, 5, 5]), 0.01).tolist() == [0, 0, 0]


def test_bias_closes_the_loop():
    """Fixed scores with expert offsets of spread 0.3: the bias must cancel them within spread / rate = 300 steps.

    MaxVio at the end is noise of one rate: loads move by less than 15 % for a bias error of 0.002."""
    g = torch.Generator().manual_seed(0)
    offset_E = torch.linspace(-0.15, 0.15, 8)
    bias_E = torch.zeros(8)
    load_E = torch.zeros(8)
    for step in range(400):
        score_TE = torch.rand(2000, 8, generator=g) + offset_E
        chosen = (score_TE + bias_E).topk(2).indices.flatten()
        load_E = torch.bincount(chosen, minlength=8)
        if step == 0:
            first = float(load_E.max() / load_E.float().mean()) - 1
        bias_E = bias_step(bias_E, load_E, 0.001)
    last = float(load_E.max() / load_E.float().mean()) - 1
    assert first > 0.4
    assert last < 0.15
    spread = bias_E + offset_E
    assert float(spread.max() - spread.min()) < 0.03


def test_shares_without_tokens_are_equal():
    """A rank or sequence that is all padding must give no NaN."""
    assert normalized_counts(torch.zeros(4)).tolist() == [0.25] * 4


def test_negative_coefficient_is_refused():
    """A negative weight would reward imbalance."""
    with pytest.raises(ValueError, match=r"balance.global_coefficient=-1"):
        BalanceConfig(global_coefficient=-1)


# -- devices and communication -------------------------------------------------------------------------------------


def random_routing(tokens=20, experts=8, top_k=3, seed=0):
    score_TE = torch.softmax(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).double(), -1)
    return score_TE, score_TE.topk(top_k).indices


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "data_parallel"])
def test_device_losses_equal_a_loop(scope):
    """A device counted once a slot instead of once a token, the scores of one expert instead of all of a device,
    padding in either. The loop follows arXiv 2405.04434 eq. 26 to 31, with shares that sum to 1."""
    score_TE, expert_TK = random_routing()
    valid_T = torch.ones(20, dtype=torch.bool)
    valid_T[17:] = False
    wanted = 0.0
    for rows in [range(10), range(10, 20)] if scope == "sequence" else [range(20)]:
        tokens = [t for t in rows if valid_T[t]]
        slots, sent = [0.0] * 4, [0.0] * 4
        for token in tokens:
            devices = [int(e) // 2 for e in expert_TK[token]]
            for device in range(4):
                slots[device] += devices.count(device)
                sent[device] += device in devices
        for device in range(4):
            score = float(score_TE[tokens][:, 2 * device : 2 * device + 2].sum())
            wanted += 0.2 * 4 * slots[device] / sum(slots) * score + 0.3 * 4 * sent[device] / sum(sent) * score
    config = BalanceConfig(
        device_coefficient=0.2, communication_coefficient=0.3, num_devices=4, device_scope=DeviceScope(scope)
    )
    assert float(terms(config, score_TE, expert_TK, (2, 10), valid_T)[0]) == pytest.approx(wanted, rel=1e-13)


def test_device_losses_of_a_list_of_pairs():
    """Routers that give tokens different numbers of experts return a list, with unused slots: the same losses as the
    table it was made from, where slots are taken away. Exact up to the order of sums."""
    score_TE, expert_TK = random_routing()
    keep_TK = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) > 0.4
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    table = Choice(expert_TK).only(keep_TK, 8)
    listed = Choice(table.expert.flatten()[order], torch.arange(20).repeat_interleave(3)[order], is_full=False)
    config = BalanceConfig(device_coefficient=0.2, communication_coefficient=0.3, num_devices=4)
    context = LayerContext(layer=0, batch_shape=(2, 10))
    a, b = (float(balance_terms(config, (Level(score_TE),), c, 8, context).weighted) for c in (table, listed))
    full = float(balance_terms(config, (Level(score_TE),), Choice(expert_TK), 8, context).weighted)
    assert a == pytest.approx(b, rel=1e-14)
    assert a != pytest.approx(full, rel=1e-3)


def test_a_device_is_counted_once_for_a_token():
    """Two slots on device 0 and one on device 1: two thirds and a third of the slots, but a half each of what is sent.
    With all scores on device 0 of 2 the losses are 2 * 2/3 and 2 * 1/2."""
    expert_TK = torch.tensor([[0, 1, 2]] * 10)
    score_TE = torch.zeros(10, 4, dtype=torch.float64)
    score_TE[:, :2] = 0.5
    for name, wanted in (("device", 4 / 3), ("communication", 1.0)):
        config = BalanceConfig(**{f"{name}_coefficient": 1.0}, num_devices=2)
        assert float(terms(config, score_TE, expert_TK, (1, 10))[0]) / 10 == pytest.approx(wanted, abs=1e-14)


def test_devices_are_counted_in_their_scope():
    """Two sequences, each on a device of its own: 2 in the scope of a sequence, 1 in that of the batch. A rank that is
    all on device 0 while another one, of the same size, is all on device 1: 2 by itself, 1 with the sum over ranks."""
    expert_TK, score_TE = torch.tensor([[0], [1], [2], [3]]), one_hot_scores([0, 1, 2, 3], 4)

    def losses(scope, rows, **forward):
        options = {"device_coefficient": 1.0, "communication_coefficient": 10.0, "num_devices": 2}
        config = BalanceConfig(**options, device_scope=DeviceScope(scope))
        shape = (len(rows) // 2, 2)
        return float(terms(config, score_TE[rows], expert_TK[rows], shape, **forward)[0]) / len(rows) / 11

    assert losses("sequence", [0, 1, 2, 3]) == pytest.approx(2.0, abs=1e-14)
    assert losses("micro_batch", [0, 1, 2, 3]) == pytest.approx(1.0, abs=1e-14)
    other = {"data": Ranks(sum=lambda count: count + count.flip(-1))}
    assert losses("micro_batch", [0, 1], **other) == pytest.approx(2.0, abs=1e-14)
    assert losses("data_parallel", [0, 1], **other) == pytest.approx(1.0, abs=1e-14)


def test_device_losses_press_on_all_experts_of_a_device():
    """d loss / d score of expert e is devices * share of its device: equal within a device, nothing through counts."""
    score_TE, expert_TK = random_routing()
    score_TE.requires_grad_()
    config = BalanceConfig(device_coefficient=0.5, num_devices=2, device_scope=DeviceScope.micro_batch)
    terms(config, score_TE, expert_TK, (1, 20))[0].backward()
    share_D = torch.bincount(expert_TK.flatten() // 4, minlength=2).double() / 60
    wanted_TE = (0.5 * 2 * share_D).repeat_interleave(4).expand(20, 8)
    torch.testing.assert_close(score_TE.grad, wanted_TE, rtol=1e-14, atol=0)


def test_device_losses_at_balance():
    """1.0 a token each when every device gets equally many slots and tokens, whatever the coefficient of others."""
    expert_TK = torch.tensor([[0, 2], [1, 3], [4, 6], [5, 7]] * 4)
    score_TE = torch.full((16, 8), 1 / 8, dtype=torch.float64)
    options = {"device_coefficient": 0.5, "communication_coefficient": 0.25, "num_devices": 4}
    config = BalanceConfig(micro_batch_coefficient=0.125, **options)
    assert float(terms(config, score_TE, expert_TK, (1, 16))[0]) / 16 == pytest.approx(0.875, abs=1e-14)


def test_devices_of_one_expert_are_experts():
    """With as many devices as experts the device loss is the loss over experts."""
    score_TE, expert_TK = random_routing()
    device = BalanceConfig(device_coefficient=0.5, num_devices=8, device_scope=DeviceScope.micro_batch)
    expert = BalanceConfig(micro_batch_coefficient=0.5)
    a, b = (float(terms(config, score_TE, expert_TK, (2, 10))[0]) for config in (device, expert))
    assert a == pytest.approx(b, rel=1e-14)


def test_device_options_belong_together():
    """A loss without its devices, devices without a loss, devices that do not divide the experts."""
    with pytest.raises(ValueError, match=r"balance.num_devices=None belongs to balance.device_coefficient=0.1"):
        BalanceConfig(device_coefficient=0.1)
    with pytest.raises(ValueError, match=r"balance.num_devices=4 belongs"):
        BalanceConfig(num_devices=4)
    for devices in (1, 3, 16):
        message = rf"balance.num_devices={devices} must divide moe.num_experts=8.*legal values: \[2, 4, 8\]"
        with pytest.raises(ValueError, match=message):
            BalanceConfig(communication_coefficient=0.1, num_devices=devices).check_experts(8)
    BalanceConfig(device_coefficient=0.1, num_devices=8).check_experts(8)
