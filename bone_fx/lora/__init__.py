"""Adapters of the LoRA family as PEFT lays them out: what is read, and what is refused."""
