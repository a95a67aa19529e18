"""Sources of videos and labels: folders, manifests, shards, TFDS."""
