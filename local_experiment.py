"""Run an experiment on this machine: see experiment/runner.py."""

import sys

from experiment.runner import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from here", file=sys.stderr)
        sys.exit(130)
