"""A search space of your own: the values that were tried are those of the file.

Run it with ``python examples/own_space.py``; it searches for 0.2 hours.
"""

from collections import Counter
from pathlib import Path

import budgetsearch as bs

# A mapping of the same form, or a bs.Space, does as well as a file.
result = bs.run(gpu="cpu", hours=0.2, space=Path(__file__).with_name("own_space.yaml"))

for name in ("rank", "alpha"):
    print(name, dict(Counter(trial.params[name] for trial in result.trials)))
print("learning rates", sorted(float(trial.params["learning_rate"]) for trial in result.trials))
