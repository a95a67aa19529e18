"""Linear and attentive probes, kNN."""
