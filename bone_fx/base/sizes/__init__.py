"""Sizes that configurations and headers claim, against what files and memory hold."""
