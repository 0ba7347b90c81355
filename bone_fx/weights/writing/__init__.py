"""Recipes computed and written, one band of rows at a time."""
