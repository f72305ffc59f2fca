"""What a program may know of the data, and how it is read off an AnnData."""
