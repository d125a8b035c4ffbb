"""The report: one HTML file that shows what a run did, what it cost and whether it kept its word.

`material` reads a run folder, the sections turn it into blocks (plain data: `blocks`, `curves`), `page` and
`charts` turn blocks into HTML and SVG, `command` writes the file. Everything comes from the run's files; the
page needs no network. No torch.
"""
