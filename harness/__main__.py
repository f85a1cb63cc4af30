"""`python -m harness COMMAND`, and the same by this file's path."""

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):
    # Started by its path, Python looks for modules in this folder, where `import harness` would find nothing, or another one.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
