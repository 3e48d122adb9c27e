"""The exemplar library (Comparative Retriever): normal images of each category, found by likeness."""
