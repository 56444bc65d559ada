"""The command line: one file a verb, no logic. Every file's `command` becomes `plures <file name>`."""
