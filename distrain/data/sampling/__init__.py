"""Which samples each lane consumes, and when: pure functions, no I/O."""
