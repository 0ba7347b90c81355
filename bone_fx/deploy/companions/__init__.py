"""The files beside a model's weights: which folder each comes from, what is copied, what is not."""
