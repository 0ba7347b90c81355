"""Lowering passes: from the operators of a trace to those of ONNX Runtime."""
