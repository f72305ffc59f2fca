"""What passes between the user's world and the package: options, keys, files, and the state of the process."""
