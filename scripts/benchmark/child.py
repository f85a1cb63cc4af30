"""Runs one sample in this process: `python -m benchmark.child MODULE FUNCTION ARGUMENTS RESULT`,
the last two a JSON text and a file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    module, function, arguments, result = sys.argv[1:]
    found = getattr(importlib.import_module(f"benchmark.{module}"), function)(
        **json.loads(arguments)
    )
    if os.environ.get("RANK", "0") == "0":
        temporary = Path(f"{result}.tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(result)


if __name__ == "__main__":
    main()
