"""From weights and token ids to logits: no text, no templates, no network here.

`weights.py` loads and repacks, `program.py` turns a forward pass into a table of operations,
`kvcache.py` owns the pages, `engine.py` runs steps.
"""
