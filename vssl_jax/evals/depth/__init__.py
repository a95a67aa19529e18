"""Depth readout of a frozen encoder."""
