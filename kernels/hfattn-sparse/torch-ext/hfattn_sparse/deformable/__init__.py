"""Multi-scale deformable attention: a weighted sum of bilinear samples of several maps (arXiv 2010.04159)."""
