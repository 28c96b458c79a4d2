"""Who is measured: one file a side, all with the interface of `Peer`. A side is imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.peers.base import Peer, Refused

__all__ = ["PEERS", "Peer", "Refused", "load", "unpacked_bundle", "use_bundle"]

PEERS: dict[str, tuple[str, str]] = {
    "ours_triton": ("ours (triton)", "ours:OursTriton"),
    "ours_copied": ("ours (triton, rows copied)", "ours:OursCopied"),
    "ours_grouped_mm": ("ours (grouped_mm)", "ours:OursGrouped"),
    "ours_loop": ("ours (loop)", "ours:OursLoop"),
    "sonic": ("SonicMoE", "sonic:Sonic"),
    "liger": ("Liger fused MoE", "liger:Liger"),
    "scattermoe": ("ScatterMoE", "scatter:ScatterMoE"),
    "torch_grouped_mm": ("torch grouped_mm", "torch_sequences:TorchGrouped"),
    "transformers": ("transformers (grouped_mm)", "transformers_experts:Transformers"),
    "deepspeed_grouped_mm": ("DeepSpeed (grouped_mm)", "deepspeed_experts:DeepSpeedGrouped"),
    "deepspeed_triton": ("DeepSpeed (Triton)", "deepspeed_experts:DeepSpeedTriton"),
    "torchtitan_equivalent": ("torchtitan-equivalent sequence", "torch_sequences:TitanEquivalent"),
}
"""Name of an option: name in the table; module and class."""


def load(name: str) -> type[Peer]:
    """The class of a side.

    Raises:
        ImportError: something that it needs is not installed, with the name of what is missing.
    """
    module, _, cls = PEERS[name][1].partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu.peers.{module}"), cls)


@contextmanager
def unpacked_bundle() -> Iterator[str]:
    """PEERS names the folder or the archive that `benchmarks/gpu/bundle.py` makes; inside, it names a folder.

    Yields:
        Where the peers are, in words.

    Raises:
        SystemExit: there is nothing at that place.
    """
    given = os.environ.get("PEERS", "")
    if not given:
        yield "no bundle of peers: PEERS=path names the folder or the archive that benchmarks/gpu/bundle.py makes"
        return
    place = Path(given).expanduser().resolve()
    with tempfile.TemporaryDirectory(prefix="peers_") as folder:
        if place.is_file():
            with tarfile.open(place) as archive:
                archive.extractall(folder, filter="data")
            place = Path(folder)
        if not place.is_dir():
            raise SystemExit(f"PEERS={given}: there is neither a folder nor an archive there")
        os.environ["PEERS"] = str(place)
        yield f"peers from {given}"


def use_bundle() -> None:
    """Put the folder that PEERS names at the end of the path: what the machine has itself comes first.

    Processes that peers start to compile their kernels find it through PYTHONPATH.
    """
    place = Path(os.environ.get("PEERS") or os.devnull)
    if place.is_dir():
        paths = [str(place), str(place / "nvidia_cutlass_dsl" / "python_packages")]
        sys.path += paths
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *paths]))
