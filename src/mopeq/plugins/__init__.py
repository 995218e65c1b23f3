"""Serving: what engines load. Nothing here imports the making wing."""
