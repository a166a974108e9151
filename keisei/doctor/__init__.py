"""The doctor: what this machine offers, what is used in the place of what it lacks, as a report.

``python -m keisei doctor`` prints it; its text goes into bug reports.
"""
