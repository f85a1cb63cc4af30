"""The program `python -m harness COMMAND`, which can also be started by the path of this file."""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):
    # If this file is started by its path, Python looks for modules in this folder. `import harness`
    # would find no package there, or another one.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
