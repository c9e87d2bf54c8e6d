"""Models and inputs that the tests share."""
