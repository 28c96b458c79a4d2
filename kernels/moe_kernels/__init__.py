"""Functions on tensors under the expert layer. One file an operation: plain-torch reference, then its fast paths."""
