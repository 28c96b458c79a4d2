"""Every kernel of the experts with every configuration that is shipped, as jobs for the compiler."""

from __future__ import annotations

from moe_kernels.choice import AMPERE, GATHERED, SPECIALIZED, KernelConfig, Tile
from moe_kernels.triton_support import SPECIALIZES
from tests.kernels.compiled.build import Job
from tests.kernels.compiled.router_kernels import compilations

QWEN3 = {"D": 2048, "F": 768, "E": 128}
DEEPSEEK = {"D": 2048, "F": 1408, "E": 64}
SMALL = {"D": 64, "F": 8, "E": 3}
DEEPSEEK_2B = {"D": 1280, "F": 856, "E": 64}


def table(rows: int, columns: int, kind: str = "bf16") -> str:
    return f"tensordesc<{kind}[{rows}, {columns}]>"


def up(name: str, tile: Tile, shape: dict[str, int], gather: bool, capability: int = 90) -> Job:
    x = "*bf16" if gather else table(tile.rows, tile.depth)
    return Job(
        name, "moe_kernels.up_projection", "up_projection_kernel",
        {"x": x, "weight": table(tile.columns, tile.depth), "index_ptr": "*i32", "tile_ptr": "*i32",
         "hidden_ptr": "*bf16", "activation_ptr": "*bf16"},
        {"D": shape["D"], "F": shape["F"], "GATHER": gather, "ROWS": tile.rows, "COLUMNS": tile.columns,
         "DEPTH": tile.depth, "SPECIALIZE": tile.specialize},
        tile.warps, tile.stages, capability, specialized=tile.specialize,
    )  # fmt: skip


def rows(name: str, tile: Tile, inner: int, outer: int, transposed: bool, scatter: bool, capability: int = 90) -> Job:
    weight = table(tile.columns, tile.depth) if transposed else table(tile.depth, tile.columns)
    return Job(
        name, "moe_kernels.expert_rows", "expert_rows_kernel",
        {"rows_desc": table(tile.rows, tile.depth), "weight": weight, "to_ptr": "*i32", "tile_ptr": "*i32",
         "out_ptr": "*bf16"},
        {"A": inner, "B": outer, "TRANSPOSED": transposed, "SCATTER": scatter, "ROWS": tile.rows,
         "COLUMNS": tile.columns, "DEPTH": tile.depth, "SPECIALIZE": tile.specialize},
        tile.warps, tile.stages, capability, specialized=tile.specialize,
    )  # fmt: skip


def hidden(name: str, tile: Tile, shape: dict[str, int], gather: bool, weighted: bool, capability: int = 90) -> Job:
    return Job(
        name, "moe_kernels.grad_hidden", "grad_hidden_kernel",
        {"grad_out": "*bf16", "weight": table(tile.depth, tile.columns), "index_ptr": "*i32", "weight_ptr": "*fp32",
         "hidden_ptr": "*bf16", "tile_ptr": "*i32", "grad_hidden_ptr": "*bf16", "activation_ptr": "*bf16",
         "product_ptr": "*fp32"},
        {"D": shape["D"], "F": shape["F"], "GATHER": gather, "WEIGHTED": weighted, "ROWS": tile.rows,
         "COLUMNS": tile.columns, "DEPTH": tile.depth, "PARTS": tile.parts},
        tile.warps, tile.stages, capability,
    )  # fmt: skip


def weight(
    name: str, tile: Tile, height: int, width: int, experts: int, gather: str, add: bool, capability: int = 90
) -> Job:
    right, alone = gather == "right", gather == "none" and tile.specialize
    return Job(
        name, "moe_kernels.grad_weight", "grad_weight_kernel",
        {"left": table(tile.depth, tile.rows) if right else "*bf16", "left_index": "*i32",
         "right": "*bf16" if right or alone else table(tile.depth, tile.columns), "right_index": "*i32",
         "end_ptr": "*i32", "out_ptr": "*fp32" if add else "*bf16"},
        {"E": experts, "A": height, "B": width, "GATHER_LEFT": gather == "left", "GATHER_RIGHT": right, "ADD": add,
         "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PARTS": tile.parts,
         "SPECIALIZE": alone},
        tile.warps, tile.stages, capability, specialized=alone,
    )  # fmt: skip


def jobs_of(
    config: KernelConfig, shape: dict[str, int], label: str, capability: int = 90, every_form: bool = False
) -> list[Job]:
    """The forms in which a configuration is launched in training without an exchange; or every form."""
    d, f, e = shape["D"], shape["F"], shape["E"]
    gathered = [not config.copy_rows, *([False] if every_form and not config.copy_rows else [])]
    found = []
    assert config.up is not None
    assert config.down is not None
    assert config.grad_hidden is not None
    assert config.grad_rows is not None
    assert config.grad_weight is not None
    assert config.add_weight is not None
    for g in gathered:
        found.append(up(f"{label} up gather={g}", config.up, shape, g, capability))
        for w in (True, False) if every_form else (True,):
            name = f"{label} grad_hidden gather={g} weighted={w}"
            found.append(hidden(name, config.grad_hidden, shape, g, w, capability))
        for add, tile in ((False, config.grad_weight), (True, config.add_weight)):
            left, right = ("left", "right") if g else ("none", "none")
            name = f"gather={g} add={add}"
            found.append(weight(f"{label} grad_down {name}", tile, d, f, e, left, add, capability))
            found.append(weight(f"{label} grad_up {name}", tile, 2 * f, d, e, right, add, capability))
    for scatter in (False, True) if every_form else (False,):
        name = f"scatter={scatter}"
        found.append(rows(f"{label} down {name}", config.down, f, d, True, scatter, capability))
        found.append(rows(f"{label} grad_rows {name}", config.grad_rows, 2 * f, d, False, scatter, capability))
    return found


def memory_bound(capability: int) -> list[Job]:
    """Kernels without products."""
    found = []
    for top_k, terms in ((8, 2), (1, 0), (0, 1)):
        types = {"rows_ptr": "*bf16", "weight_ptr": "*fp32", "slot_ptr": "*i32", "first_ptr": "*i32",
                 "added_ptr": "*bf16", "more_ptr": "*bf16", "out_ptr": "*bf16"}  # fmt: skip
        constants = {"D": 2048, "K": top_k, "WEIGHTED": top_k != 1, "ADDED": terms, "BLOCK": 2048}
        found.append(Job(f"combine K={top_k} sm{capability}", "moe_kernels.combine", "combine_kernel", types, constants,
                         4, 3, capability, uses_tensor_cores=False))  # fmt: skip
    types = {"grad_ptr": "*bf16", "rows_ptr": "*bf16", "weight_ptr": "*fp32", "token_ptr": "*i64",
             "grad_rows_ptr": "*bf16", "grad_weight_ptr": "*fp32"}  # fmt: skip
    found.append(Job(f"grad combine sm{capability}", "moe_kernels.combine", "grad_combine_kernel", types,
                     {"D": 7168, "BLOCK": 8192}, 8, 3, capability, uses_tensor_cores=False))  # fmt: skip
    types = {"end_ptr": "*i32", "tile_ptr": "*i32", "num_tiles": "i32", "num_rows": "i32"}
    constants = {"E": 384, "BLOCK_E": 512, "ROWS": 128, "T": 64}
    found.append(Job(f"row tiles sm{capability}", "moe_kernels.tiles", "_row_tiles_kernel", types, constants, 4, 3,
                     capability, uses_tensor_cores=False, unaligned=("num_tiles", "num_rows")))  # fmt: skip
    return found


def all_jobs() -> list[Job]:
    """Everything that is shipped."""
    jobs = [job for capability in (80, 90, 100) for job in memory_bound(capability)] + compilations()
    jobs += jobs_of(GATHERED, QWEN3, "gathered qwen3 sm90", every_form=True)
    for name, shape in (("deepseek", DEEPSEEK), ("deepseek 2b", DEEPSEEK_2B)):
        jobs += jobs_of(GATHERED, shape, f"gathered {name} sm90")
    jobs += jobs_of(GATHERED, SMALL, "gathered small sm90")
    if SPECIALIZES:
        jobs += jobs_of(SPECIALIZED, QWEN3, "specialized qwen3 sm90", every_form=True)
        jobs += jobs_of(SPECIALIZED, DEEPSEEK_2B, "specialized deepseek 2b sm90")
    jobs += jobs_of(GATHERED, QWEN3, "gathered qwen3 sm100", 100)
    jobs += jobs_of(AMPERE, QWEN3, "ampere qwen3 sm80", 80)
    return jobs
