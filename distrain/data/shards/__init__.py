"""Making and checking shards and their index, offline."""
