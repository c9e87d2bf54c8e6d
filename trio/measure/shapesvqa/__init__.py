"""ShapesVQA: drawn scenes and questions about them, made from a seed."""
