"""`python -m vlmbench ...` is the command `vlmbench ...`, for environments without its script."""

from vlmbench.run.cli import main

if __name__ == '__main__':
    main()
