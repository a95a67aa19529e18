"""Checkpoints, their verification and the record of a run."""
