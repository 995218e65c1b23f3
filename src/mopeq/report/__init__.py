"""The report: one self-contained HTML file about finished checkpoints. It looks on and changes nothing.

`verbs/report.py` gathers `facts.Subject`s from folders; `render` turns them into a page, `charts` draws its pictures.
"""
