"""Packs the peers of the GPU benchmark, for a machine without a network: exact versions, nothing of their dependencies.

    python benchmarks/gpu/bundle.py FOLDER                    FOLDER/peers/ and FOLDER/peers.tar.xz, with their size
    SCATTERMOE=path python benchmarks/gpu/bundle.py FOLDER    ScatterMoE from a checkout instead of its repository

Wheels are taken for the Python of the GPU machine (3.12), which need not be the one that runs this. There,
`make bench-gpu PEERS=peers.tar.xz` (or the unpacked folder) puts them at the end of the path. Dependencies are left
out on purpose: SonicMoE asks for an older torch than it runs with. torch, triton, transformers and numpy must be there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PYTHON = "3.12"
WHEELS = (
    "sonic-moe==0.1.2.post1",
    "quack-kernels==0.3.11",
    "nvidia-cutlass-dsl==4.4.2",
    "nvidia-cutlass-dsl-libs-base==4.4.2",
    "apache-tvm-ffi==0.1.15.post2",
    "einops==0.8.2",
    "liger-kernel==0.8.5",
    # What DeepSpeed imports at its start; what the machine has itself comes first on the path.
    "hjson==3.1.0",
    "msgpack==1.2.4",
    "psutil==7.2.2",
    "py-cpuinfo==9.0.0",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
)
BUILT = {"DeepSpeed": "deepspeed==0.19.8"}
"""Published as source only."""
SCATTERMOE = "git+https://github.com/shawntan/scattermoe@47b5e1502e5a10e82c8e5945d761b877849871e7"
"""Version 0.3.0, which is on no index."""
GLIBC = (39, 36, 35, 34, 31, 28, 27, 24, 17)
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64", "linux_x86_64")


def pip(*arguments: str) -> str | None:
    """Run pip.

    Returns:
        None, or the last line of what it complained about.
    """
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def collect(wheels: Path) -> dict[str, str]:
    """All wheels into one folder.

    Returns:
        What could not be had, with pip's reason.
    """
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    missing = {}
    for wheel in WHEELS:
        if why := pip("download", "--quiet", "--no-deps", *target, "--dest", str(wheels), wheel):
            missing[wheel] = why
    for name, source in {**BUILT, "ScatterMoE": os.environ.get("SCATTERMOE", SCATTERMOE)}.items():
        # Pure Python as they are built here, so that the Python that builds does not matter.
        if why := pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), source):
            missing[name] = why
    return missing


def pack(wheels: Path, folder: Path) -> tuple[Path, Path]:
    """Unpack the wheels into one folder, and pack that as one archive: small, since xz sees all files at once."""
    place, archive = folder / "peers", folder / "peers.tar.xz"
    shutil.rmtree(place, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(place)
    with tarfile.open(archive, "w:xz", preset=6) as out:
        for entry in sorted(place.iterdir()):
            out.add(entry, entry.name)
    return place, archive


def main() -> None:
    """Collect, pack, say how large it is."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="where peers/ and peers.tar.xz go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        missing = collect(Path(wheels))
        place, archive = pack(Path(wheels), folder)
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    unpacked = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    print(f"{place}: {unpacked / 2**20:.0f} MiB")
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB. Carry it, and run make bench-gpu PEERS={archive.name}")


if __name__ == "__main__":
    main()
