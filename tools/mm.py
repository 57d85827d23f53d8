"""Run mmdet's or mmseg's own train.py / test.py from the installed wheel: ``python tools/mm.py train CONFIG
...``.

A newcomer needs no clone of mmdet: the scripts ship inside the wheels, and the config's ``default_scope``
says which one is meant. Every further argument goes to the script unchanged; ``torch.distributed.run
tools/mm.py train CONFIG --launcher pytorch`` works as with the script itself.
"""

import sys

from mm_plugins.compat.host_tools import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
