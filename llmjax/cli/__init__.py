"""The command line: a file for each group of verbs, the flags they share, and ``main``.

Here: flags, what is printed where, exit codes.  Not here: work; each verb calls one function of the library.
"""
