"""What the NeurIPS LLM Efficiency Challenge asked its entries for, made of a finished run."""
