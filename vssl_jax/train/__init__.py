"""Trainer: phases, steps and metrics, independent of the method."""
