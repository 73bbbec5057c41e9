"""Entry point of the ranks of the health check, apart from launch/doctor.py because that takes seconds to import."""

import sys

from distrain.lifetime import end_with_agent

if __name__ == "__main__":
    end_with_agent()

    from launch.doctor import main

    sys.exit(main())
