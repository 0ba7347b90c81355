"""A published folder, looked at again."""
