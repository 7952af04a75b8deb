"""Random models and those of keras.applications, held against the files that every way to a file makes of them."""
