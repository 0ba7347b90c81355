"""From a model to a graph. Of the rooms only this one and `trainer` import transformers."""
