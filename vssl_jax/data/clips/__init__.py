"""Reads clips from video files: isolated decoding, sampling, augmentation."""
