"""Run the command `lcdist` as `python -m lcdist`, also under torchrun."""

import sys

from lcdist.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
