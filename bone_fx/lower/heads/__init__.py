"""Lowering passes around attention: heads, rotary embeddings, packed projections."""
