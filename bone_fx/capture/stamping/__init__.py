"""Equal layers traced once."""
