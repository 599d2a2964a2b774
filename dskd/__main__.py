"""`python -m dskd`: the command line without its script."""

from dskd.cli.main import main

if __name__ == "__main__":
    main()
