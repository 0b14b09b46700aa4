"""Recipes under budgetsearch and under a loop around Optuna."""
