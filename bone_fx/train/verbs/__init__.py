"""PEFT's verbs of an adapted module, by subject."""
