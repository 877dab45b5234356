"""Score: run the teacher over the unlabeled pool, on any number of pods."""
