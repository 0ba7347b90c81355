"""Verification of decoder graphs: prompts, caches, long texts, and the folder that genai runs."""
