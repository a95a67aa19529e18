"""Utilities without dependencies on the rest of the package."""
