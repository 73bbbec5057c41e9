"""Entry point of the ranks of the health check, apart from launch/doctor.py because that takes seconds to import."""

import os
import sys

from distrain.lifetime import end_with_agent
from distrain.masking import mask_reports

if __name__ == "__main__":
    end_with_agent()
    mask_reports()

    from launch.doctor import main

    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)  # without waiting for a host that does not answer
    sys.exit(code)
