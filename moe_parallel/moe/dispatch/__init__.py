"""Dispatchers: move rows to the experts that own them and back. Two verbs, no parameters."""
