"""Evaluations: frozen probes and depth (via `encode` only); fine-tuning."""
