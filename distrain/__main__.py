"""The entry of every process: runs the command line and turns what happened into an exit code."""

import os
import sys
import time

from distrain.errors import EXIT_USER, RankError, TemporaryError, UserError


def main() -> int:
    from distrain import cli

    try:
        return cli.run(sys.argv[1:])
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(error, RankError):
            print(f"distrain: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # torchrun ends all ranks when the first one exits; rank 0 has something to say
        return EXIT_USER
    except TemporaryError as error:
        print(f"distrain: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
