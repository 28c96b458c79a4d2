"""Benchmarks. Most are scripts of one file; `gpu` is a package, started with `python -m benchmarks.gpu.run`."""
