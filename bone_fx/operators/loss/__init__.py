"""The loss of a language model: cross entropy, and the head in front of it."""
