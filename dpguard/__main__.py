"""``python -m dpguard``."""

from dpguard.cli.main import main

if __name__ == "__main__":
    main()
