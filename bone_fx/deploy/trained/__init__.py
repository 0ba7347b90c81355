"""What adapters train of a model: weights of layers, heads, rows of embeddings, biases."""
