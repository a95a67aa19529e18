"""Optional on-disk cache of teacher outputs."""
