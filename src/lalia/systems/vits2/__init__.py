"""VITS2 text to speech: multi-speaker, four optimizers (VITS 2106.06103, VITS2 2307.16430)."""
