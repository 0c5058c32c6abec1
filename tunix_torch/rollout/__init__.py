"""Sampling completions: choosing tokens, and the rows that are decoded."""
