"""Pretrain and fine-tune mixture-of-experts language models.

Letters used in tensor names, everywhere in this repository. They stand for logical sizes and are put on local
tensors only, never on parameters, buffers or options.

T tokens on this rank      B sequences on this rank      S tokens per sequence
D model width              V vocabulary                  H attention heads
E experts of the layer     L experts on this rank        P ranks on the `ep` axis (E = L * P)
K experts per token        F expert width
N slots on this rank, before the exchange                R rows for local experts, after it
"""
