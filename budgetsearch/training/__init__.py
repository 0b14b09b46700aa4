"""torch, transformers, peft and bitsandbytes: base models, data, adapters, the recipe, evaluation."""
