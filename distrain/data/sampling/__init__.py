"""Which samples each lane consumes at each step: pure functions, no I/O."""
