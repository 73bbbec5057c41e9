"""The launcher: `distrain launch` starts a run on one machine, many machines or a Slurm cluster."""
