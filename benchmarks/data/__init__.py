"""How rows become tokens: speed, memory and disk."""
