"""An adapter of one kind as a folder of another."""
