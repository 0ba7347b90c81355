"""A causal language model captured in ONNX Runtime's operators."""
