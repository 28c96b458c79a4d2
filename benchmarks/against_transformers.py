"""Training speed and memory of our model against the same architecture in `transformers`, on this CPU.

Both sides have the same shapes and weights' number, read the same text, and do the same work: forward, cross-entropy,
backward, clipping by the global norm, fused AdamW. Balance losses are off on both. One process: against the fastest of
transformers' expert implementations that runs here. Two processes: our expert parallelism against transformers' own
expert parallelism with FSDP2. Steps of the two sides alternate within one run, so that noise of the machine hits both;
what counts is the ratio. Peak memory comes from a process of its own for each side.

    python benchmarks/against_transformers.py            all shapes; rewrites the tables of docs/benchmarks.md
    python benchmarks/against_transformers.py --quick     a minute, prints only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import processor, write_between
from torch import Tensor

from moe_data.batch import TokenBatch
from moe_parallel import launch
from moe_parallel.engines.native import NativeEngine
from moe_parallel.mesh import ParallelConfig, ParallelMesh, make_layout
from moe_parallel.model.architecture import Architecture, ModelConfig
from moe_parallel.model.attention import GroupedQueryConfig, QKNorm
from moe_parallel.model.initialize import InitConfig
from moe_parallel.moe.balance import BalanceConfig
from moe_parallel.moe.layer import MoEConfig
from moe_parallel.moe.routers.token_choice import TokenChoiceConfig
from moe_parallel.optim import OptimConfig

BEGIN, END = "<!-- against transformers: begin -->", "<!-- against transformers: end -->"


@dataclass(frozen=True)
class Shape:
    """A model and a batch of one rank."""

    name: str
    dim: int
    layers: int
    heads: int
    experts: int
    top_k: int
    expert_dim: int
    vocabulary: int
    sequence: int
    rows: int

    @property
    def batch(self) -> tuple[int, int, int]:
        """What `batch_of` takes."""
        return self.rows, self.sequence, self.vocabulary


SHAPES = (
    Shape("small", 256, 4, 4, 16, 4, 128, 257, 256, 16),
    Shape("fine-grained", 512, 2, 8, 64, 8, 128, 4096, 512, 4),
    Shape("wide experts", 512, 2, 8, 8, 2, 1024, 4096, 512, 4),
)


def text_tokens(count: int, vocabulary: int, seed: int) -> Tensor:
    """Bytes of Python's own library, spread over the vocabulary."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40])
    start = seed * count % (len(text) - count)
    return torch.tensor(list(text[start : start + count])) * (vocabulary // 257)


def batch_of(rows: int, sequence: int, vocabulary: int, seed: int) -> TokenBatch:
    """One document a row; the text is that of the seed."""
    token_BS = text_tokens(rows * (sequence + 1), vocabulary, seed).view(rows, -1)
    position = torch.arange(sequence).expand(rows, -1).contiguous()
    return TokenBatch(
        token_BS=token_BS[:, :-1].contiguous(),
        target_BS=token_BS[:, 1:].contiguous(),
        position_BS=position,
        document_BS=torch.zeros_like(position),
        sequence_B=seed * rows + torch.arange(rows),
        source_B=torch.zeros(rows, dtype=torch.int64),
        document_lengths=((sequence,),) * rows,
        num_targets=rows * sequence,
        num_valid=rows * sequence,
    )


def our_step(shape: Shape) -> Callable[[int], float]:
    """A training step of this toolkit; returns the loss."""
    world, rank = dist.get_world_size(), dist.get_rank()
    architecture = Architecture(
        model=ModelConfig(dim=shape.dim, num_layers=shape.layers),
        attention=GroupedQueryConfig(num_heads=shape.heads, num_kv_heads=shape.heads, qk_norm=QKNorm.head),
        moe=MoEConfig(num_experts=shape.experts, expert_dim=shape.expert_dim, num_shared_experts=0),
        router=TokenChoiceConfig(top_k=shape.top_k, normalize=True),
        balance=BalanceConfig(),
        vocab_size=shape.vocabulary,
    )
    parallel = ParallelConfig(ep=world, shard=1)
    mesh = ParallelMesh(make_layout(parallel, world, shape.experts), "cpu")
    engine = NativeEngine(architecture, mesh, parallel, OptimConfig(), torch.device("cpu"), torch.float32)
    engine.init_weights(InitConfig(), seed=0)
    targets = world * shape.rows * shape.sequence

    def step(index: int) -> float:
        sums, _ = engine.forward_backward([batch_of(*shape.batch, index * world + rank)], index, targets, targets)
        engine.step(1e-3, engine.gradient_norm())
        return float(sums.summed(engine.group).cross_entropy) / targets

    return step


def their_step(shape: Shape, experts: str) -> Callable[[int], float]:
    """The same step with transformers; with several ranks under its own expert parallelism and FSDP2."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    world, rank = dist.get_world_size(), dist.get_rank()
    config = Qwen3MoeConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.dim, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=shape.dim // shape.heads,
        num_experts=shape.experts, num_experts_per_tok=shape.top_k, moe_intermediate_size=shape.expert_dim,
        norm_topk_prob=True, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    if world == 1:
        model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)
    else:
        from transformers.distributed import DistributedConfig

        with tempfile.TemporaryDirectory() as folder:
            shared = [folder]
            dist.broadcast_object_list(shared)
            if rank == 0:
                Qwen3MoeForCausalLM(config).save_pretrained(shared[0])
            dist.barrier()
            layout = DistributedConfig(ep_size=world, fsdp_size=world, ep_implementation="all_to_all")
            model = AutoModelForCausalLM.from_pretrained(
                shared[0], distributed_config=layout, dtype=torch.float32, attn_implementation="sdpa",
                experts_implementation=experts,
            )  # fmt: skip
            dist.barrier()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(index: int) -> float:
        batch = batch_of(*shape.batch, index * world + rank)
        logits = model(input_ids=batch.token_BS).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.target_BS.flatten())
        loss.backward()
        if world == 1:  # over its two meshes torch's clipping raises, and transformers offers none
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def worker(side: str, shape: Shape, steps: int, experts: str) -> None:
    """Alternate steps of the sides asked for; rank 0 prints one line of JSON."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    here = launch.start(timeout_seconds=300)
    sides = {}
    if side in ("ours", "both"):
        sides["ours"] = our_step(shape)
    if side in ("theirs", "both"):
        sides["theirs"] = their_step(shape, experts)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {}
    for index in range(steps + 2):
        for name, step in sides.items():
            dist.barrier()
            began = time.perf_counter()
            losses[name] = step(index)
            if index >= 2:  # the first two build caches and optimizer state
                seconds[name].append(time.perf_counter() - began)
    if here.is_first:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print("RESULT " + json.dumps({"seconds": seconds, "losses": losses, "peak_GiB": peak}), flush=True)
    launch.finish()


def run(ranks: int, threads: int, side: str, shape: Shape, steps: int, experts: str) -> dict:
    """Start the worker on `ranks` processes and read its result."""
    arguments = [__file__, "--worker", side, "--shape", shape.name, "--steps", str(steps), "--experts", experts]
    command = [sys.executable, *arguments]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0][len("RESULT ") :])


def compare(ranks: int, shape: Shape, steps: int, quick: bool) -> dict:
    """One row of the table."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    implementations = ["grouped_mm"] if ranks > 1 or quick else ["grouped_mm", "eager"]
    runs = {
        how: run(ranks, threads, "both", shape, steps if how == "grouped_mm" else 3, how) for how in implementations
    }
    fastest = min(runs, key=lambda how: statistics.median(runs[how]["seconds"]["theirs"]))
    if fastest != "grouped_mm":
        runs[fastest] = run(ranks, threads, "both", shape, steps, fastest)
    result = runs[fastest]
    ours, theirs = result["seconds"]["ours"], result["seconds"]["theirs"]
    ratios = sorted(b / a for a, b in zip(ours, theirs))
    tokens = ranks * shape.rows * shape.sequence
    row = {
        "shape": shape.name, "ranks": ranks, "threads": threads, "transformers": fastest,
        "ours tokens/s": tokens / statistics.median(ours), "theirs tokens/s": tokens / statistics.median(theirs),
        "speed ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
    }  # fmt: skip
    for side in ("ours", "theirs"):
        row[f"{side} peak GiB"] = run(ranks, threads, side, shape, 3, fastest)["peak_GiB"]
    return row


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| shape | processes x threads | their experts | ours tokens/s | theirs tokens/s | speed ratio (min-max)"
        " | ours peak GiB | theirs peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['shape']} | {r['ranks']} x {r['threads']} | {r['transformers']} | {r['ours tokens/s']:,.0f} | "
            f"{r['theirs tokens/s']:,.0f} | **{r['speed ratio']:.2f}** ({r['lowest']:.2f}-{r['highest']:.2f}) | "
            f"{r['ours peak GiB']:.2f} | {r['theirs peak GiB']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--quick", action="store_true", help="one shape, few steps, prints only")
    parser.add_argument("--worker", choices=["ours", "theirs", "both"], help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--experts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape = next(s for s in SHAPES if s.name == arguments.shape)
        return worker(arguments.worker, shape, arguments.steps, arguments.experts)
    import transformers

    rows = []
    for shape in SHAPES[:1] if arguments.quick else SHAPES:
        for ranks in (1, 2):
            rows.append(compare(ranks, shape, 4 if arguments.quick else arguments.steps, arguments.quick))
            print(json.dumps(rows[-1]), flush=True)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    facts = f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, {versions}; `make bench`"
    shapes = "\n".join(
        f"- {s.name}: " + ", ".join(f"{k} {v}" for k, v in asdict(s).items() if k != "name") for s in SHAPES
    )
    text = f"{facts}\n\n{table(rows)}\n\nShapes (fp32; `rows` sequences a rank and step):\n\n{shapes}"
    print(text)
    if not arguments.quick:
        write_between(BEGIN, END, text)


if __name__ == "__main__":
    main()
