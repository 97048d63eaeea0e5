"""``python -m espmedsam_edge`` is the command ``espmedsam-edge``."""

from espmedsam_edge.cli import main

main()
