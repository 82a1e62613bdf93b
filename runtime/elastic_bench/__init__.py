"""Measuring a bundle: runtimes side by side, in turns, at several budgets. No torch; every figure comes after a check."""
