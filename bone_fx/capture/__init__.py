"""From a model to a graph. The only room that imports transformers."""
