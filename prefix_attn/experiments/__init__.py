"""The experiments of the paper (Li and Liang 2021) and the methods that it compares, on one runner."""
