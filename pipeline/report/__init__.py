"""The page of a run: its content, its plots, and its forms as HTML, Markdown and JSON."""
