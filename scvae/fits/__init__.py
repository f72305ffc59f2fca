"""What calls to fit, to compare and to tune are made of, and what a fitted model does, a room for each."""
