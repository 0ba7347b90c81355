"""How a captured graph is called: signature, conditions, positions."""
