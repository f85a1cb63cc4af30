"""Read the program's source code: which names loops and methods set before they read them."""
