"""Start a training run.

    python launch/run.py --nproc-per-node N launch/train.py CONFIG [section.key=value ...]

Alone it runs in a world of one process. The same as `lcdist train`.
"""

import sys

from lcdist.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
