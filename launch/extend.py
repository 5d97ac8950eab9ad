"""Start the main job: `python launch/extend.py --help` lists its options."""

import sys

from lcdist.commands.extend import main

if __name__ == "__main__":
    sys.exit(main())
