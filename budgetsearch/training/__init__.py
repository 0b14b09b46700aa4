"""torch, transformers, peft and bitsandbytes: base models, data, adapters, the recipe, evaluation."""

import logging

# At its import it tells of kernels that may be fetched from the Hub; nothing here waits for them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
