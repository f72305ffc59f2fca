"""How a program is fitted and judged: the bound, the training loop and its steps."""
