"""The command line, a file per command; `varaccel.__main__` puts it together with the command of the app."""
