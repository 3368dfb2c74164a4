"""Checkpoints in other formats, tensor by tensor and without a model.

table.py is the weight mapping; from_*.py read a source, to_*.py write a destination; command.py puts them together.
"""
