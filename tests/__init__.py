"""Tests; `unit` mirrors `src` file for file."""

from hypothesis import settings

# A busy machine makes any example slow once; how long one takes is not what these tests are about.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
