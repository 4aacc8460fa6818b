"""Where the command `cnngru-edge` begins."""

import sys

from cnngru_edge.runtime.machine.libraries import import_fault


def main() -> None:
    """Load the command line and run it; what it cannot do without is one line if it is broken."""
    try:
        from cnngru_edge.export.cli import main as run
    except Exception as e:
        if fault := import_fault(e):
            sys.exit(f"Error: {fault}")
        raise
    run()
