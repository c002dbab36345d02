"""`python -m slimqwen` is the command line."""

from slimqwen.cli import main

if __name__ == "__main__":
    main()
