"""Training steps of whole models on one NVIDIA GPU, next to `transformers` and torchtitan: `make bench-gpu-train`."""
