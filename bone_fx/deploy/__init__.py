"""From a base and adapters to a verified, published folder."""
