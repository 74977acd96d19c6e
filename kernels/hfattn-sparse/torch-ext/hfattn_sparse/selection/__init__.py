"""Which key blocks each query block reads: block means, their scores and a rule."""
