"""The trainer: phases, steps, checkpoints, metrics. It knows no method."""
