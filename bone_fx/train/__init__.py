"""The train flow: adapt a model, step, save."""
