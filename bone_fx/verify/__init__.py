"""Three-way verification.

The unmerged torch model, the folded one, and ONNX Runtime agree, or nothing is published.
"""
