"""``omni``: audio in, text out. Whisper → projector → our own GPT; every training stage is a System."""
