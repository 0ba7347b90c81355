"""Recipes: where the bytes of a constant come from and what is done to them."""
