"""Attention that a model computes without transformers' interface."""
