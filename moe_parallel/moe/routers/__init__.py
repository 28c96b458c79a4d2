"""Routers: one file each. A router turns tokens into a `Routing` and returns what it counted."""
