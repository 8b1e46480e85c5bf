"""From the shell to Hydra: words by their type, refusals in one line, and the help.

`words` splits the arguments, `schema` says what each word takes, `values` writes a value as Hydra reads it, `explain`
says why Hydra refused a command line, `help` prints the words.
"""
