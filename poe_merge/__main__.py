"""``python -m poe_merge`` is ``poe-merge``."""

from poe_merge.cli import main

if __name__ == "__main__":
    main()
