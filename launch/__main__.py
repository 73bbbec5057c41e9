"""`python -m launch`: the same as `distrain launch`."""

import sys

from distrain.masking import mask_reports
from launch.cli import main

if __name__ == "__main__":
    mask_reports()
    sys.exit(main())
