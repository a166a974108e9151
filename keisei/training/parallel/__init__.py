"""The pool as a trainer sees it: manager, communicator, synchronizer."""
