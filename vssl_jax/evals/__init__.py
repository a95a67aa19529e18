"""Measures of a frozen encoder; they see `encode` and nothing else of it."""
