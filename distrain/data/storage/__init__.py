"""Access to shards, local or remote: one client, one retry policy, one cache."""
