"""Mistakes of users: one line that says what is wrong and what would be right, code 2, nothing written or lost."""

from __future__ import annotations

import hashlib
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.runs import TORCHRUN, Runner, Running, at_step, checkpoints, curve

# Overrides, and what the lines on standard error must contain.
COMMAND_LINE: list[tuple[list[str], list[str]]] = [
    (["router.topk=2"], ["unknown option router.topk; did you mean router.top_k"]),
    (["moe.n_experts=4", "modle=tiny"], ["moe.n_experts; did you mean moe.num_experts", "modle; did you mean model"]),
    (["data.sources.0.kindd=text"], ["unknown option data.sources.0.kindd; did you mean data.sources[].kind"]),
    (["attention.kv_rank=8"], ["attention.kv_rank is not one of the chosen attention"]),
    (["+foo=1", "+moe.foo=2", "++train.step=3"], ["option foo;", "option moe.foo;", "step; did you mean train.steps"]),
    (["+data.sources.0.pathes=[x]"], ["unknown option data.sources.0.pathes; did you mean data.sources[].paths"]),
    (["model=tinny"], ["model=tinny: there is no such choice; did you mean tiny? choices: deepseek_v2_lite, "]),
    # What a choice is made of is none itself.
    (["init=upcycl"], ["did you mean upcycle? choices: add_domain, adjugate, chain, delta, "]),
    (["experiment=mine"], ["experiment=mine: there is no such choice; choices: gshard, pretrain_deepseek"]),
    (["experiments=mine"], ["unknown option experiments; `--help` lists all, --config-dir adds groups of yours"]),
    (["train.steps=many"], ["train.steps=many: Value 'many' of type 'str' could not be converted to Integer"]),
    (["train.nonfinite=ignore"], ["train.nonfinite=ignore: Invalid value 'ignore', expected one of [stop, skip]"]),
    (["optim.learning_rate=null"], ["optim.learning_rate=null: field 'optim.learning_rate' is not Optional"]),
    (["train.steps=${train.stepps}"], ["train.steps: Interpolation key 'train.stepps' not found"]),
    (["train.steps"], ["Error parsing override 'train.steps'; missing EQUAL", "give options as name=value"]),
    (["model=tiny,small_cpu"], ["Ambiguous value for argument 'model=tiny,small_cpu'", "--multirun"]),
    (["router.top_k=0", "optim.beta1=2"], ["router.top_k=0 must be at least 1", "optim.beta1=2.0 must lie in 0..1"]),
    (
        ["router.top_k=9", "parallel.ep=3", "train.micro_batch_sequences=3", "attention.num_heads=5"],
        [
            "parallel.ep=3 does not divide the 1 ranks; legal values: [1]",
            "train.micro_batch_sequences=3 does not divide the 8 sequences of each rank; legal values: [1, 2, 4, 8]",
            "model.dim=64 must be a multiple of 2 * attention.num_heads=10",
        ],
    ),
    (["router.top_k=9"], ["router.top_k=9 is larger than moe.num_experts=8; lower top_k or add experts"]),
    (["parallel.ranks=4"], ["parallel.ranks=4 but the launcher started 1 processes; start 4"]),
    (["train.global_batch_tokens=100"], ["global_batch_tokens=100 must be a multiple of train.sequence_tokens=32"]),
    (["model.max_sequence_tokens=16"], ["train.sequence_tokens=32 is more than model.max_sequence_tokens=16; shorten"]),
    (["model.vocab_size=100"], ["model.vocab_size=100 is smaller than the tokenizer's 257 tokens; raise"]),
    (["model.max_sequence_tokens=64", "evaluation.sample_tokens=64"], ["sample_tokens=64 after a prompt of 4"]),
    (["evaluation.sample_tokens=4", "evaluation.sample_prompt=''"], ["sample_prompt='' has no token; give some"]),
    (["resume=/nowhere"], ["resume=/nowhere is not a checkpoint; use never, auto, or a path to step_00001000"]),
    (["run.dir=/dev/null/runs"], ["/dev/null"]),
    (["--config-dir=/nowhere"], ["/nowhere", "not found"]),
    # One value out of its range in every other section.
    (["model.num_layers=0"], ["model.num_layers=0 must be at least 1"]),
    (["attention.num_kv_heads=3"], ["attention.num_heads=4", "attention.num_kv_heads=3"]),
    (["moe.num_experts=0"], ["moe.num_experts=0"]),
    (["moe.expert_kernel=triton"], ["moe.expert_kernel=triton cannot run: ", "expert_kernel=auto takes what can"]),
    (["moe.kernel_table=/nowhere.json"], ["/nowhere.json is no table of kernels as scripts/tune_kernels.py writes it"]),
    (["balance.global_coefficient=-1"], ["balance.global_coefficient=-1"]),
    (["parallel.ep=0"], ["parallel.ep=0"]),
    (["train.steps=0"], ["train.steps=0 must be at least 1"]),
    (["optim.learning_rate=0"], ["optim.learning_rate=0.0 must be positive"]),
    (["init.std=0"], ["init.std=0.0 must be positive"]),
    (["data.prefetch_steps=0"], ["data.prefetch_steps=0 must be at least 1"]),
    (["tokenizer=bpe", "tokenizer.vocab_size=3"], ["tokenizer.vocab_size=3"]),
    (["evaluation.every_steps=-1"], ["evaluation.every_steps=-1 must not be negative"]),
    (["checkpoint.keep_last=0"], ["checkpoint.keep_last=0 must be at least 1"]),
    (["tracking.log_every_steps=0"], ["tracking.log_every_steps=0 must be at least 1"]),
]  # fmt: skip


def refused(running: Running, *fragments: str) -> None:
    """Code 2 is checked by the caller; here: lines of errors and nothing else, each fragment in them."""
    lines = running.err.splitlines()
    lines = [line for line in lines if not line.startswith("data: ")]
    assert lines, "no word"
    assert all(line.startswith("error: ") for line in lines), running.err
    assert len(lines) <= len(fragments), running.err
    for fragment in fragments:
        assert fragment in running.err
    assert "Traceback" not in running.err
    assert running.out == ""


@pytest.mark.parametrize(("overrides", "fragments"), COMMAND_LINE, ids=[" ".join(o) for o, _ in COMMAND_LINE])
def test_command_line(runner: Runner, overrides: list[str], fragments: list[str]) -> None:
    """Would catch: a mistake that is ignored, clamped, found only after the start, told without its name, its value
    or a remedy, or buried in a traceback.
    """
    running = runner.run("run", *overrides, codes=2)
    refused(running, *fragments)
    assert not running.folder.exists()


def test_ranks(runner: Runner) -> None:
    """Would catch: the same line from each rank; a rank that waits for others which have left; relations that only
    a number of ranks can break.
    """
    overrides = ("parallel.ep=4", "train.global_batch_tokens=96")
    running = runner.start("run", *overrides, ranks=2, patch="import time; time.sleep(0 if RANK else 1)")
    running.processes[0].join(60)
    # A launcher ends all ranks as soon as one has ended; one that was quicker must not rob rank 0 of its words.
    assert running.processes[1].is_alive()
    running.signal(1, signal.SIGTERM)
    assert running.finish() == [2, -signal.SIGTERM]
    refused(
        running,
        "parallel.ep=4 does not divide the 2 ranks; legal values: [1, 2]",
        "train.global_batch_tokens=96 is 3 sequences, which 2 ranks cannot share evenly; use a multiple of 64 tokens",
    )


def write_source(folder: Path, case: str) -> list[str]:
    """A source that is wrong in one way; the options that choose it."""
    folder.mkdir()
    if case == "absent":
        return [f"data.sources.0.paths=[{folder}/textx]"]
    if case == "empty folder":
        return [f"data.sources.0.paths=[{folder}]"]
    path = folder / "a.txt"
    path.write_bytes({
        "no text": b"", "binary": b"a\x00b", "not UTF-8": b"abc \xff\xfe", "short": b"a few words", "shard": b"x" * 60
    }[case])  # fmt: skip
    if case != "shard":
        return [f"data.sources.0.paths=[{path}]", "data.sources.0.validation_fraction=0"]
    from moe_data.shards import ShardWriter

    with ShardWriter(folder / "a", 257) as writer:
        writer.add(np.full(500, 7, dtype=np.int32))
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-10])
    return ["data=tokens", f"data.sources.0.paths=[{folder / 'a'}]", "data.sources.0.validation_fraction=0"]


@pytest.mark.parametrize(
    ("case", "fragment"),
    [
        ("absent", "textx does not exist (working folder: "),
        ("empty folder", "holds no .txt .md .text file for kind=text; give a glob"),
        ("no text", "source 'text' has no training document"),
        ("binary", "a.txt row 0 is binary (it holds a zero byte); take it out of the paths"),
        ("not UTF-8", "a.txt row 0 is not UTF-8 text: byte 0xff at 4; convert it"),
        ("short", "train.sequence_tokens=32 is longer than source 'text' (12 tokens); shorten the sequence"),
        ("shard", "a.bin: 990 bytes, but "),
    ],
)
def test_data(runner: Runner, tmp_path: Path, case: str, fragment: str) -> None:
    """Would catch: input that no one can train on and that gives a traceback, an endless loop, or a run folder that
    a second try has to be cleared of.
    """
    options = write_source(tmp_path / "source", case)
    running = runner.run("run", *options, f"data.cache_dir={tmp_path / 'cache'}", codes=2)
    refused(running, fragment)
    assert not running.folder.exists()


def test_data_that_only_one_rank_cannot_read(runner: Runner) -> None:
    """Would catch: ranks that blame the network for what is wrong with the data of another one, and steps that were
    good until then and are lost.
    """
    at_start = """
from moe_parallel import run
def broken(*arguments):
    raise ValueError("shard of rank 1 is corrupt")
if RANK == 1:
    run.TrainingData = broken
"""
    refused(runner.run("start", "parallel.ep=2", ranks=2, patch=at_start, codes=2), "shard of rank 1 is corrupt")
    later = """
from moe_data.loader import TrainingData
batch = TrainingData.batch
def broken(self, step, *arguments):
    if RANK == 1 and step == 5:
        raise ValueError("shard of rank 1 is corrupt")
    return batch(self, step, *arguments)
TrainingData.batch = broken
"""
    running = runner.run("later", "parallel.ep=2", ranks=2, patch=later, codes=2)
    assert running.err.count("error: shard of rank 1 is corrupt") == 1
    assert "Traceback" not in running.err
    assert checkpoints(running.folder) == ["step_00000005"]


def test_an_error_of_one_rank_is_told_by_it(runner: Runner) -> None:
    """Would catch: silence about the only error that matters, because the rank that has it is not rank 0."""
    patch = "from moe_parallel import launch; launch._PATIENCE_SECONDS = 1"
    patch += at_step(2, "if RANK: raise ValueError('only here')")
    running = runner.run("run", "parallel.ep=2", ranks=2, patch=patch, codes=None)
    assert [process.exitcode for process in running.processes] == [1, 2]
    assert "error on rank 1: only here" in running.err


def fingerprint(folder: Path) -> dict[str, str]:
    """What lies in a folder, to the bit."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_checkpoints_that_do_not_fit(runner: Runner) -> None:
    """Would catch: a run that begins to write before it knows that it cannot go on, and spoils what was there; a
    checkpoint loaded into another model or onto other data.
    """
    good = runner.run("run", "train.steps=6", "checkpoint.every_steps=3")
    other = runner.run("other", "train.steps=1")
    before = fingerprint(good.folder)
    more = ("train.steps=12", "resume=auto")
    for overrides, fragment in (
        (("resume=never",), "has checkpoints already; resume=auto continues it, another run.name starts beside it"),
        ((f"resume={other.folder}/checkpoints/step_00000001",), "has checkpoints already; resume=auto continues it"),
        ((*more, "moe.expert_dim=48"), "is a checkpoint of another model: moe.expert_dim: 32 in the checkpoint, 48"),
        ((*more, "train.global_batch_tokens=512"), "global_batch_sequences=8, this run has 16"),
        ((*more, "train.seed=2"), "seed=1, this run has 2"),
        ((f"resume={other.folder}", "run.name=new"), "is not a checkpoint; did you mean "),
    ):
        refused(runner.run("run", *overrides, codes=2), fragment)
        assert fingerprint(good.folder) == before, overrides
    newest = good.folder / "checkpoints/step_00000006"
    (newest / "__0_0.distcp").write_bytes(b"")
    refused(runner.run("new", f"resume={newest}", codes=2), "is damaged: __0_0.distcp has 0 bytes")
    running = runner.run("run", *more)
    assert "skipping a checkpoint" in running.err
    assert "step_00000003 at step 3" in running.err
    assert max(curve(good.folder)) == 12


def test_no_space_for_a_checkpoint(runner: Runner) -> None:
    """Would catch: a full disk that ends a run with a traceback, or that takes the earlier checkpoints along."""
    good = runner.run("run", "train.steps=3")
    before = fingerprint(good.folder / "checkpoints")
    full = """
import shutil
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(2**30, 2**30 - 2**18, 2**18)
"""
    running = runner.run("run", "resume=auto", "train.steps=6", patch=full, codes=2)
    assert "error: not enough disk space for a checkpoint" in running.err
    assert "free 0.000 GiB; free some space, or lower checkpoint.keep_last=2" in running.err
    assert "Traceback" not in running.err
    assert fingerprint(good.folder / "checkpoints") == before


def test_a_loss_that_is_not_a_number(runner: Runner) -> None:
    """Would catch: a run that trains on with NaN, that saves it over good checkpoints, or that does not say where
    it came from. All ranks take part in the search and one speaks.
    """
    poison = at_step(2, "next(self.engine.model.blocks[1].ffn.shared.parameters()).data.to_local().fill_(float('nan'))")
    running = runner.run("stop", "checkpoint.every_steps=1", "parallel.ep=2", ranks=2, patch=poison, codes=1)
    assert running.err.splitlines()[-1] == (
        "error: step 3: loss nan, gradient norm nan, first in layers.1.ffn.shared.gate_up; resume with a lower "
        "optim.learning_rate, or set train.nonfinite=skip"
    )
    assert "Traceback" not in running.err
    assert checkpoints(running.folder) == ["step_00000001", "step_00000002"]
    assert max(curve(running.folder)) == 2
    running = runner.run("huge", "optim.learning_rate=1e30", "optim.warmup_steps=0", codes=1)
    assert re.search(r"error: step \d: loss .*, gradient norm .*; resume with a lower", running.err)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and the optimizer's state."""
    path = checkpoint.parent / "tensors.pt"
    dcp_to_torch_save(checkpoint, path)
    return {name: tensor for name, tensor in torch.load(path).items() if name.startswith(("model.", "optimizer."))}


def test_steps_that_are_not_a_number_are_skipped(runner: Runner) -> None:
    """Would catch: a skipped step that changes weights, moments or the router's bias; a run that skips for ever."""
    poison = """
from moe_parallel.engines.native import NativeEngine
forward_backward = NativeEngine.forward_backward
def poisoned(self, batches, step, *counts):
    found = forward_backward(self, batches, step, *counts)
    if step in {steps}:
        next(self.model.parameters()).grad.fill_(float("nan"))
    return found
NativeEngine.forward_backward = poisoned
"""
    options = ("train.nonfinite=skip", "balance=loss_free", "train.dry_batch=false", "checkpoint.every_steps=1")
    running = runner.run("skip", *options, "checkpoint.keep_last=12", patch=poison.replace("{steps}", "(2, 5)"))
    assert running.out.count("gradient norm nan, in the backward pass only; skipped") == 2
    assert [step for step, row in curve(running.folder).items() if row["grad/norm"] == "NaN"] == [3, 6]
    states = [state(running.folder / f"checkpoints/step_{step:08d}") for step in (2, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(
        torch.equal(states[1][name], states[2][name])
        for name in ("model.head.weight", "model.layers.1.ffn.router.bias")
    )
    running = runner.run("give_up", *options, patch=poison.replace("{steps}", "range(1, 99)"), codes=1)
    assert "error: step 11: " in running.err
    assert "; ten steps in a row were skipped" in running.err


def test_under_torchrun(runner: Runner) -> None:
    """Would catch: a message that is drowned in those of other ranks. torchrun ends with 1, whatever its workers'
    code, and adds its own report.
    """
    command = runner.command(*TORCHRUN, "2", name="run", overrides=["router.topk=2", "parallel.ep=2"])
    out, err = command.communicate(timeout=60)
    assert command.returncode == 1
    assert out == ""
    assert err.count("error: unknown option router.topk; did you mean router.top_k") == 1
    assert "exitcode  : 2" in err
