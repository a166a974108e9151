"""The pool as a trainer sees it."""
