"""Programs that write data sets: synthetic videos, transcoding, shards."""
