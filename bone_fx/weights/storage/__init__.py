"""Tensors in files and in scratch memory."""
