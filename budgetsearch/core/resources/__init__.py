"""What a configuration needs: memory and disk."""
