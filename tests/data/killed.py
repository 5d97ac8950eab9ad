"""Tokenize and kill this process on the way: `killed.py CORPUS OUT SETTINGS STAGE COUNT`.

The process ends at the COUNT-th progress report of STAGE. It imports no more than tokenizing needs,
so that it starts fast.
"""

import json
import os
import signal
import sys
from pathlib import Path

from lcdist.data.prepare import shards
from lcdist.data.prepare.corpus import Source
from lcdist.data.prepare.prepare import prepare
from lcdist.data.prepare.settings import TokenizeSettings


def main(corpus: str, out: str, settings: str, stage: str, count: str) -> None:
    shards.SHARD_BYTES = 4000
    reports: list[str] = []

    def kill_at(reported_stage: str, _done: int, _total: int) -> None:
        reports.append(reported_stage)
        if reports.count(stage) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(Source(corpus), Path(out), TokenizeSettings(**json.loads(settings)), progress=kill_at)


if __name__ == "__main__":
    main(*sys.argv[1:])
