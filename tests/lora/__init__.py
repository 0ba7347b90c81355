"""LoRA-family adapters: read, folded, exported, refused."""
