"""From one command to many nodes: `python -m launch`, from a checkout."""
