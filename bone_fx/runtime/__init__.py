"""What runs a published folder: ONNX Runtime sessions on the provider that was asked for."""
