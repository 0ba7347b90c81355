"""`torch.export` of any module: examples, patches, checks."""
