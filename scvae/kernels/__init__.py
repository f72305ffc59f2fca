"""Loops compiled for a CPU, and the operations of torch that call them."""
