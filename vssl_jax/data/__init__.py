"""Videos in, numpy batches out: sources, decoding, transforms, pipeline."""
