"""Translations of ATen operators: those of PyTorch and onnxscript, and ours."""
