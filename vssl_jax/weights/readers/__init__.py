"""Reads safetensors, npz and PyTorch files without executing code."""
