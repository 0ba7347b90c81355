"""ONNX: from an exported program to files on disk; see README.md."""
