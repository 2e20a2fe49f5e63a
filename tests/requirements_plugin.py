"""Collects `@pytest.mark.requirement(ids)`."""
