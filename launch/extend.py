"""Run `lcdist extend`: `python launch/extend.py --help` lists its options."""

import sys

from lcdist.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["extend", *sys.argv[1:]]))
