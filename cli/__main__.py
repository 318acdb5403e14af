"""``python -m neuralsde_ito.cli``: what ``accelerate launch -m`` and ``torchrun -m`` start in each process."""

from . import main

main()
