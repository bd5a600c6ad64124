"""``python -m figbridge``."""

from figbridge.cli import main

if __name__ == "__main__":
    main()
