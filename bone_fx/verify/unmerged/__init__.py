"""Layers under adapters that are not folded, read and run without the exporter's code."""
