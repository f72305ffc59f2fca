"""The commands of the command line, by what they are about. ``app`` lists them, and puts them together."""
