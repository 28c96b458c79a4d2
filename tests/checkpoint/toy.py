"""A small model with everything that a checkpoint must carry, in any layout, and its training step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

IDENTITY = {"model": {"dim": 6, "num_layers": 1}, "moe": {"num_experts": 8}}


class Toy(nn.Module):
    """Dense weight, stacked experts, a router with its bias (a buffer), a tied head, and a frozen weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.embedding = nn.Parameter(numbers(10, 6))
        self.head = self.embedding
        self.experts = nn.Parameter(numbers(8, 4, 6))
        self.router = nn.Parameter(numbers(8, 6))
        self.frozen = nn.Parameter(numbers(3), requires_grad=False)
        self.never_used = nn.Parameter(numbers(5))
        self.register_buffer("bias", numbers(8))
        self.register_buffer("scratch", numbers(2), persistent=False)

    def shard(self, ep: int) -> None:
        """Embedding on a 1-D mesh of all ranks, experts on a 2-D one: rows over ep, columns over the rest."""
        world = torch.distributed.get_world_size()
        dense = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
        sparse = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("shard", "ep"))
        self.embedding = nn.Parameter(distribute_tensor(self.embedding.data, dense, [Shard(0)]))
        self.head = self.embedding
        self.experts = nn.Parameter(distribute_tensor(self.experts.data, sparse, [Shard(1), Shard(0)]))
        # Replicated over every rank: one of them must write it, all must read it.
        self.router = nn.Parameter(distribute_tensor(self.router.data, dense, [Replicate()]))


def make(seed: int, ep: int | None = None) -> tuple[Toy, torch.optim.AdamW]:
    model = Toy(seed)
    if ep is not None:
        model.shard(ep)
    groups = [
        {"params": [model.embedding, model.experts], "weight_decay": 0.1},
        {"params": [model.router, model.never_used], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def train(model: Toy, optimizer: torch.optim.AdamW, step: int) -> None:
    """One optimizer step with gradients that depend only on the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in (model.embedding, model.experts, model.router):
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    model.bias += 0.001 * step


def whole(model: Toy, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Everything that must survive, as whole plain tensors; without the code under test."""
    state: dict[str, Tensor] = {"bias": model.bias.clone()}
    for name, parameter in model.named_parameters():
        state[name] = _plain(parameter)
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{moment}"] = _plain(value)
    return state


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names that only one has or whose bits differ."""
    names = sorted(left.keys() | right.keys())
    return [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]


def flip(file: Path, place: int = -20) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
