"""Start a program on several processes, with torchrun's arguments:

    python launch/run.py --nproc-per-node N launch/train.py CONFIG [section.key=value ...]

Unlike torchrun it prints an error once and last, and ends with the exit status of the rank that
failed.
"""

import sys

from lcdist.commands.launcher import main

if __name__ == "__main__":
    sys.exit(main())
