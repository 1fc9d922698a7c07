"""What runs inside the sandbox: standard library only, plus IPython (and ipykernel) in the two personalities.

Nothing here imports the rest of `llm_gym`: the sandbox sees this folder and the site-packages, no more.
"""
