"""A path, GGUF file or hub id as a model without weights and the recipes of its weights."""
