"""Equal layers of a decoder traced once."""
