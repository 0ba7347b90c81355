"""The graph of a model that will be trained, and its loss."""
