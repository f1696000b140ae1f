"""``python -m sdebench`` is the command ``sdebench``."""

from sdebench.cli import main

if __name__ == "__main__":
    main()
