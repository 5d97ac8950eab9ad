"""Start a training run.

torchrun --nproc-per-node N launch/train.py CONFIG [section.key=value ...]

Alone, without torchrun, it is a world of one. The same as `lcdist train`.
"""

import sys

from lcdist.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
