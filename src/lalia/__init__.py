"""Lalia: five kinds of speech model on one data format, one trainer, one checkpoint and one command line."""

__version__ = "0.1.0"
