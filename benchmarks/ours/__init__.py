"""Keisei's side of every measurement, written against its public contract only."""
