"""The tuner with Triton kernels, in the interpreter: it measures, refuses what is wrong, stores what it found. What
is fastest there means nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_kernels import tuning
from moe_kernels.choice import INTERPRETER, ExpertKernel, Problem, choose, read_table, write_table

PROBLEM = Problem(torch.device("cpu"), torch.float32, dim=32, expert_dim=32, num_experts=2, num_rows=16)


def test_what_is_stored_is_what_training_takes(tmp_path, monkeypatch):
    """Tiles that were measured but not stored, or stored in a form that is not found again for the same shape. Every
    implementation runs; Triton is made to look fastest."""
    quick = {"loop": 3.0, "grouped_mm": 2.0, "triton, gathered": 1.0, "triton, copied": 1.5}
    compare = tuning._compare
    monkeypatch.setattr(tuning, "milliseconds_of", lambda call, device: 0.0 * len(str(call())))  # once is enough here
    monkeypatch.setattr(tuning, "_compare", lambda *a: dict.fromkeys(compare(*a), 0.0) and quick)
    said: list[str] = []
    line = tuning.tune(PROBLEM, top_k=2, say=said.append)
    assert line["milliseconds"] == quick
    assert sum("2 of 2 tiles ran" in text for text in said) == 12, said  # 6 products, gathered and copied
    path = tmp_path / "table.json"
    write_table(path, [line])
    choice = choose(ExpertKernel.auto, PROBLEM, read_table(path))
    assert choice.how is ExpertKernel.triton
    assert choice.config.up is not None
    assert choice.config.gathers


def test_a_wrong_kernel_is_not_timed():
    """A tile whose result is wrong may be the fastest. One that fails to launch must not end the tuning."""
    right = torch.ones(4)
    slow, wrong, broken = INTERPRETER.up, replace(INTERPRETER.up, rows=64), replace(INTERPRETER.up, rows=32)
    said: list[str] = []

    def call(tile):
        if tile == broken:
            raise RuntimeError("out of shared memory")
        return [right * 1.1 if tile == wrong else right, None]

    best = tuning._best_tile("up", [wrong, broken, slow], call, torch.device("cpu"), said.append)
    assert best == slow
    assert "WRONG" in said[0]
    assert "out of shared memory" in said[1]
    nan = tuning._relative_error(torch.full((4,), torch.nan), right)
    assert not nan <= tuning.LARGEST_ERROR


def test_candidates_are_legal():
    """Roles for warps need 4 of them and an end in one part; a product whose rows are gathered cannot have any."""
    for copies in (False, True):
        config = tuning.starting_config(PROBLEM.device, copies)
        for product in ("up", "down", "grad_hidden", "grad_rows", "grad_weight", "add_weight"):
            tiles = tuning.candidates(product, config, copies)
            assert tiles[0] == getattr(config, product)
            assert len(set(tiles)) == len(tiles)
            assert all(not t.specialize or (copies and t.warps == 4 and t.parts == 1) for t in tiles)
