"""Checks that need an NVIDIA GPU. Each names its twin on a CPU, which always runs.

Counted: without a GPU they show as skipped, with the reason.
"""

import pytest
import torch
import torch.distributed as dist

from tests.parity.cases import OPTIM, Case

pytestmark = pytest.mark.gpu


def test_a_training_step_on_the_device():
    """Twin: the bf16 rows of tests/parity. One step in bf16 on the GPU against float64 on the CPU.

    A loss near log(37) = 3.6 with activations rounded to bf16 (2^-9 each, some dozens in a row, at random) agrees to
    about 1 %; a wrong mask, layout or scale does not."""
    from moe_parallel.engines.native import NativeEngine
    from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
    from moe_parallel.model.initialize import InitConfig

    case = Case("gpu", 1, rows=4, balance={"global_coefficient": 0.1, "bias_rate": 0.01})
    losses = []
    for device, dtype, master in (("cuda", torch.bfloat16, torch.float32), ("cpu", torch.float64, torch.float64)):
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        parallel = ParallelConfig()
        mesh = ParallelMesh(make_layout(parallel, 1, case.num_experts), device)
        engine = NativeEngine(case.architecture(), mesh, parallel, OPTIM, torch.device(device), dtype, master)
        engine.init_weights(InitConfig(std=0.1), seed=0)
        trace = []
        for step in range(3):
            batch = case.batch(0, 0, 0).to(device)
            sums, _ = engine.forward_backward([batch], step, batch.num_targets, batch.num_valid)
            engine.step(1e-2, engine.gradient_norm())
            engine.update_routers(sums)
            trace.append(float(sums.cross_entropy) / batch.num_targets)
        losses.append(trace)
        dist.destroy_process_group()
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][-1] < losses[0][0]
