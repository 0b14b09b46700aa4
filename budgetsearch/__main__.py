"""`python -m budgetsearch`."""

from budgetsearch.cli import main

main()
