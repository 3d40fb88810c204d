"""`python -m aerogel` is the command line."""

from aerogel.cli.app import main

if __name__ == "__main__":
    main()
