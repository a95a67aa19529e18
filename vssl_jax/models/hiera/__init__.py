"""Hiera: encoder, decoder and token order."""
