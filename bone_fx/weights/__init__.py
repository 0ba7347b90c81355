"""Recipes: where the bytes of a graph's constants come from, and what is done to them."""
