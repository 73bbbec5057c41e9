"""Stop requests, hang detection, rollback, and fault injection."""
