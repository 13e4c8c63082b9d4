"""What holds for all tests."""

from hypothesis import settings

# A machine that stands still for a moment is no fault of the example that it met.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")
