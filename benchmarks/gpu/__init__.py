"""One layer of experts on one NVIDIA GPU, next to every peer that can run there: `make bench-gpu`."""
