"""The command ``espmedsam-edge``, also as ``python -m espmedsam_edge``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command; Ctrl-C while its modules are loaded ends it as it does later."""
    try:
        from espmedsam_edge.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Aborted!\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
