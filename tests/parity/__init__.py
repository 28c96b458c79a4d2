"""The parity suite: any layout computes what one process computes, every gradient included."""
