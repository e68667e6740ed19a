"""``python -m crossgate``, which torchrun starts."""

from crossgate.cli import main

main()
