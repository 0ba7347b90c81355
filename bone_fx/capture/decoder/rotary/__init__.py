"""Rotary position embeddings: watched, recognised, tabulated."""
