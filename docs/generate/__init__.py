"""Make what the documentation site shows from code and measured rows, when the site is built.

`hook.py` is what MkDocs calls. A line `<!-- make: NAME -->` of a page is replaced by what
`blocks.py` makes under that name: the chooser of methods, the keys of the configuration, tables of
measured rows. Links to files outside `docs/` lead to pages that `repository.py` makes of these
files, so that they work in the site as they do in the repository.
"""
