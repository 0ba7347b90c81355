"""Sizes that configurations and headers claim, held against what the files hold."""
