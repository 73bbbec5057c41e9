"""Entry point of the ranks of the health check, apart from launch/doctor.py because that takes seconds to import."""

from distrain.__main__ import entry


def check() -> int:
    from launch.doctor import main

    return main()


if __name__ == "__main__":
    entry(check)
