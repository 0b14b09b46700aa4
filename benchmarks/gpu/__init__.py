"""The first minutes on a card."""

import os

from budgetsearch.engines.local import allocator

os.environ.update(allocator())  # before torch is there; without it each new width is allocated anew
