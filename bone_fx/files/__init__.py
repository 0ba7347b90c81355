"""Folders and files that are not ours: read within bounds, renamed without replacing anything."""
